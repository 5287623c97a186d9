"""`lightning-bn tasks` says of a file what `task_drift` says of the bank that was saved in it."""

import pytest
import torch

from lightning_bn.functional import task_drift, task_statistics
from lightning_bn.functional.tasks.in_file import tasks_in_file
from tests.models import SmallResNet, images, seeded


@pytest.fixture
def bank():
    """Two tasks in all layers but one, and a third that no batch was of."""
    model = seeded(SmallResNet)
    bank = task_statistics(model, ["det", "seg", "depth"], exclude="head")
    for step in range(30):
        with bank.task("det"):
            model(images(seed=step))
        with bank.task("seg"):
            model(3 * images(seed=step) + 1)
    return model, bank


def lightning(model, bank, prefix=""):
    state = {prefix + name: value for name, value in model.state_dict().items()}
    return {"state_dict": state, "callbacks": {"TaskBatchNorm": bank.state_dict()}, "pytorch-lightning_version": "2.6"}


def test_drift_is_that_of_the_bank_without_what_no_batch_was_of(bank, save, found):
    model, sets = bank
    code, said = found("tasks", save(lightning(model, sets)))
    sets.remove("depth")
    expected = task_drift(sets)
    [one] = said["banks"]
    assert code == 1  # since depth has seen nothing
    assert one["key"] == "callbacks.TaskBatchNorm"
    assert one["updates"] == {"det": 30, "seg": 30, "depth": 0}
    assert one["layers"] == list(expected.layers)
    assert torch.allclose(torch.tensor(one["drift"], dtype=torch.float64), expected.values, rtol=1e-9)
    assert one["suggested"] == expected.suggest() != []
    assert "'depth' were never updated" in one["faults"][0]


@pytest.mark.parametrize("wrapped", ["", "_orig_mod."])
def test_tasks_that_have_all_seen_batches_are_well(wrapped, bank, save, command):
    model, sets = bank
    sets.remove("depth")
    code, said = command("tasks", save(lightning(model, sets, wrapped)))
    assert code == 0
    assert said.startswith("Updates of each task's statistics: det 30, seg 30\n")
    assert "Layers that need a set for each task: modules: [" in said
    assert max(map(len, said.splitlines())) <= 80


def test_above_moves_what_is_suggested(bank, save, found):
    model, sets = bank
    path = save(lightning(model, sets))
    assert found("tasks", path, "--above", "1e9")[1]["banks"][0]["suggested"] == []
    assert len(found("tasks", path, "--above", "0")[1]["banks"][0]["suggested"]) > 1


def test_a_bank_that_was_saved_by_hand_is_found(bank, save):
    model, sets = bank
    [found] = tasks_in_file(save({"net": model.state_dict(), "sets": sets.state_dict()}))
    assert found.key == "sets"
    assert found.drift.others == ("head.bn",)
    assert found.unseen == ["depth"]


def test_a_bank_without_the_models_state_lacks_the_default_task(bank, save, found):
    _, sets = bank
    code, said = found("tasks", save({"sets": sets.state_dict()}))
    assert code == 1
    assert said["banks"][0]["tasks"] == ["seg", "depth"]
    assert "'det', the default task: it is left out" in said["banks"][0]["faults"][-1]


def test_many_tasks_are_listed_in_pairs_where_a_matrix_is_too_wide(save, command):
    model = seeded(SmallResNet)
    bank = task_statistics(model, [f"a_task_with_a_name_{number}" for number in range(6)])
    for number, task in enumerate(bank.tasks):
        with bank.task(task):
            model((1 + number) * images(seed=number))
    code, said = command("tasks", save(lightning(model, bank)))
    assert code == 0
    assert "Tasks that lie furthest apart (jeffreys)" in said
    assert "... 5 more pairs that lie closer" in said
    assert max(map(len, said.splitlines())) <= 80


def test_a_file_without_tasks_says_so(trained, save, command):
    code, said = command("tasks", save(trained))
    assert code == 2
    assert "The statistics in its state dict are used for all tasks." in said


@pytest.mark.parametrize("part", ["running_mean", "running_var"])
def test_a_set_that_is_not_whole_is_named(part, bank, save, command):
    model, sets = bank
    state = lightning(model, sets)
    del state["callbacks"]["TaskBatchNorm"]["sets"]["seg"][f"layer1.0.bn1.{part}"]
    code, said = command("tasks", save(state))
    assert code == 2
    assert "task 'seg'" in said
    assert "'layer1.0.bn1'" in said
