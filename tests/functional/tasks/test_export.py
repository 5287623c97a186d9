"""A checkpoint of several tasks becomes one of a single task: its statistics in the state dict, all else as it was."""

import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_bn
from lightning_bn.functional import TaskStatistics, export_task, task_statistics
from tests.averages import EMAWeightAveraging
from tests.callbacks.fits import Classifier, quiet, train_loader, val_loader
from tests.checkpoints import differences, read
from tests.models import SharedNorm, SmallResNet, bits, fill_statistics, images, seeded, state_bits

TASKS = ["det", "seg"]
KEY = "TaskBatchNorm"


class Alternating(Classifier):
    """Even batches are of the first task, odd ones of the second."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with lightning_bn.task(TASKS[batch_idx % 2]):
            return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with lightning_bn.task(TASKS[batch_idx % 2]):
            super().validation_step(batch, batch_idx)


def trained(model: nn.Module, tasks: list[str] = TASKS, **settings: Any) -> TaskStatistics:
    """Statistics of each task after three batches with a mean and a scale of its own."""
    bank = task_statistics(model.train(), tasks, **settings)
    for step in range(3):
        for place, name in enumerate(tasks):
            with bank.task(name), torch.no_grad():
                model((1 + place) * images(6, seed=step) + 3 * place)
    return bank


def saved(folder: Path, model: nn.Module, **banks: TaskStatistics) -> Path:
    states = {KEY if name == "bank" else f"{KEY}[{name}]": bank.state_dict() for name, bank in banks.items()}
    content = {"epoch": 3, "state_dict": model.state_dict(), "callbacks": {"EarlyStopping": {"wait": 1}, **states}}
    torch.save(content, folder / "all.ckpt")
    return folder / "all.ckpt"


def outputs(model: nn.Module) -> bytes:
    with torch.no_grad():
        return bits(model.eval()(images(5, seed=77)))


@pytest.fixture
def two(tmp_path: Path) -> tuple[nn.Module, TaskStatistics, Path]:
    model = fill_statistics(seeded(SmallResNet))
    bank = trained(model)
    return model, bank, saved(tmp_path, model, bank=bank)


# What is in the file afterwards


@pytest.mark.parametrize("task", TASKS)
def test_a_fresh_model_computes_what_the_model_does_inside_the_task(two, task, tmp_path):
    model, bank, path = two
    assert export_task(path, task, tmp_path / "deep" / "one.ckpt") == tmp_path / "deep" / "one.ckpt"
    fresh = SmallResNet()
    fresh.load_state_dict(read(tmp_path / "deep" / "one.ckpt")["state_dict"])
    with bank.task(task):
        assert outputs(fresh) == outputs(model)
        assert state_bits(fresh) == {name: bits(value) for name, value in model.named_buffers()} | {
            name: bits(value) for name, value in model.named_parameters()
        }


def test_all_else_is_bit_identical_and_the_statistics_per_task_are_gone(two, tmp_path):
    _, bank, path = two
    export_task(path, "seg", tmp_path / "one.ckpt")
    before, after = read(path), read(tmp_path / "one.ckpt")
    changed = {f"/state_dict/{name}" for name in bank.state_dict()["sets"]["seg"]}
    del before["callbacks"][KEY]
    assert set(differences(before, after)) == changed
    assert after["callbacks"] == {"EarlyStopping": {"wait": 1}}


def test_the_default_task_is_what_the_state_dict_holds(two, tmp_path):
    _, _, path = two
    export_task(path, "det", tmp_path / "one.ckpt")
    before, after = read(path), read(tmp_path / "one.ckpt")
    del before["callbacks"][KEY]
    assert differences(before, after) == []


def test_the_checkpoint_itself_is_as_it_was(two, tmp_path):
    path = two[-1]
    before = path.read_bytes()
    export_task(path, "seg", tmp_path / "one.ckpt")
    assert path.read_bytes() == before


# Names


def test_a_layer_with_two_names_is_written_under_both(tmp_path):
    model = SharedNorm()
    bank = trained(model)
    export_task(saved(tmp_path, model, bank=bank), "seg", tmp_path / "one.ckpt")
    fresh = SharedNorm()
    fresh.load_state_dict(read(tmp_path / "one.ckpt")["state_dict"])
    with bank.task("seg"):
        assert outputs(fresh) == outputs(model)


def test_layers_below_a_wrapper_are_found(tmp_path):
    model = fill_statistics(seeded(SmallResNet))
    model.layer1 = torch.compile(model.layer1, backend="eager")  # type: ignore[assignment]
    bank = task_statistics(model, TASKS)
    bank.write("seg", bank.snapshot("det"))
    with bank.task("seg"), torch.no_grad():
        model.get_submodule("layer1._orig_mod.0.bn1").running_mean.fill_(7.0)  # type: ignore[union-attr, operator]
    path = saved(tmp_path, model, bank=bank)
    export_task(path, "seg", tmp_path / "one.ckpt")
    before, after = read(path)["state_dict"], read(tmp_path / "one.ckpt")["state_dict"]
    assert differences(before, after) == ["/layer1._orig_mod.0.bn1.running_mean"]
    assert after["layer1._orig_mod.0.bn1.running_mean"].tolist() == [7.0] * 4


def test_a_model_that_is_a_layer_itself(tmp_path):
    layer = nn.BatchNorm2d(3)
    bank = trained(layer)
    export_task(saved(tmp_path, layer, bank=bank), "seg", tmp_path / "one.ckpt")
    assert bits(read(tmp_path / "one.ckpt")["state_dict"]["running_mean"]) == bits(bank.snapshot("seg").mean)


def test_layers_without_statistics_per_task_keep_theirs(tmp_path):
    model = fill_statistics(seeded(SmallResNet))
    bank = trained(model, modules=["layer1"])
    path = saved(tmp_path, model, bank=bank)
    export_task(path, "seg", tmp_path / "one.ckpt")
    changed = differences(read(path)["state_dict"], read(tmp_path / "one.ckpt")["state_dict"])
    assert len(changed) == 4 * 3
    assert all(name.startswith("/layer1.") for name in changed)


# Several callbacks


def test_all_callbacks_that_have_the_task_are_read_and_others_stay(tmp_path):
    model = fill_statistics(seeded(SmallResNet))
    body = task_statistics(model, ["det", "seg"], modules=["layer1"])
    head = task_statistics(model, ["cls", "seg"], modules=["head"])
    stem = task_statistics(model, ["day", "night"], modules=["bn1"])
    for index, bank in enumerate((body, head, stem)):
        with bank.task(bank.tasks[1]), torch.no_grad():
            model.train()(images(6, seed=index))
    path = saved(tmp_path, model, body=body, head=head, stem=stem)
    export_task(path, "seg", tmp_path / "one.ckpt")
    after = read(tmp_path / "one.ckpt")
    assert list(after["callbacks"]) == ["EarlyStopping", "TaskBatchNorm[stem]"]
    changed = differences(read(path)["state_dict"], after["state_dict"])
    assert {name.split(".")[0] for name in changed} == {"/layer1", "/head"}
    export_task(tmp_path / "one.ckpt", "night", tmp_path / "two.ckpt")
    assert list(read(tmp_path / "two.ckpt")["callbacks"]) == ["EarlyStopping"]


# Checkpoints of a Trainer


def fit(folder: Path, *callbacks: pl.Callback) -> tuple[Alternating, TaskStatistics, Path]:
    pl.seed_everything(3, verbose=False)
    module, statistics = Alternating(), lightning_bn.TaskBatchNorm(TASKS)
    saver = ModelCheckpoint(dirpath=folder, filename="all")
    trainer = quiet(callbacks=[statistics, *callbacks, saver], enable_checkpointing=True, max_epochs=1)
    trainer.fit(module, train_loader(), val_loader())
    assert statistics.bank is not None
    return module, statistics.bank, folder / "all.ckpt"


def test_checkpoint_of_a_trainer_loads_without_the_callback(tmp_path):
    module, bank, path = fit(tmp_path)
    export_task(path, "seg", tmp_path / "seg.ckpt")
    alone = Classifier.load_from_checkpoint(tmp_path / "seg.ckpt")
    with bank.task("seg"):
        expected = outputs(module)
    assert outputs(alone) == expected
    assert outputs(module) != expected
    trainer = quiet(max_epochs=2)
    trainer.fit(alone.train(), train_loader(), val_loader(), ckpt_path=tmp_path / "seg.ckpt")
    assert trainer.global_step == 8


@pytest.fixture
def averaged(tmp_path: Path) -> Path:
    """Weights averaged, and statistics per task of them and of those in training."""
    return fit(tmp_path, EMAWeightAveraging(decay=0.9))[-1]


def test_averages_get_theirs_and_the_weights_in_training_theirs(averaged, tmp_path):
    export_task(averaged, "seg", tmp_path / "one.ckpt")
    before, after = read(averaged), read(tmp_path / "one.ckpt")
    state = before["callbacks"].pop(KEY)
    assert differences(state["sets"], state["current_sets"])
    for entry, sets in (("state_dict", "sets"), ("current_model_state", "current_sets")):
        assert {name: bits(after[entry][name]) for name in state[sets]["seg"]} == {
            name: bits(value) for name, value in state[sets]["seg"].items()
        }
    changed = {f"/{entry}/{name}" for entry in ("state_dict", "current_model_state") for name in state["sets"]["seg"]}
    assert set(differences(before, after)) <= changed


def test_averages_without_statistics_of_the_weights_in_training_are_refused(averaged, tmp_path):
    content = read(averaged)
    del content["callbacks"][KEY]["current_sets"]
    torch.save(content, averaged)
    with pytest.raises(ValueError, match=r"averaged weights beside those in training.*no 'current_sets'"):
        export_task(averaged, "seg", tmp_path / "one.ckpt")
    assert not (tmp_path / "one.ckpt").exists()
    export_task(averaged, "det", tmp_path / "one.ckpt")


# What is refused


def test_a_task_that_is_not_in_the_file_is_named_with_those_that_are(two, tmp_path):
    with pytest.raises(ValueError, match=r"no task 'sgm' in all\.ckpt; the tasks are 'det', 'seg'\. Closest: 'seg'\."):
        export_task(two[-1], "sgm", tmp_path / "one.ckpt")
    assert not (tmp_path / "one.ckpt").exists()


@pytest.mark.parametrize("callbacks", [{"EarlyStopping": {}}, {KEY: {}}, {}, None])
def test_a_checkpoint_without_statistics_per_task_says_so(callbacks, tmp_path):
    content: dict[str, Any] = {"state_dict": SmallResNet().state_dict()}
    torch.save(content | ({} if callbacks is None else {"callbacks": callbacks}), tmp_path / "all.ckpt")
    with pytest.raises(ValueError, match=r"all\.ckpt has no statistics per task"):
        export_task(tmp_path / "all.ckpt", "det", tmp_path / "one.ckpt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("layer2.0.bn1.running_var"), r"layer 'layer2\.0\.bn1' has .* is not there"),
        (lambda state: state.update({"head.bn.running_mean": torch.zeros(5)}), r"shape \(5,\).*'head\.bn' have \(4,\)"),
    ],
)
def test_a_layer_that_is_missing_or_of_other_channels_is_named(change, says, two, tmp_path):
    content = read(two[-1])
    change(content["state_dict"])
    torch.save(content, two[-1])
    with pytest.raises(ValueError, match=says):
        export_task(two[-1], "seg", tmp_path / "one.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.ckpt"]


def test_a_layer_of_the_same_end_elsewhere_is_not_taken(tmp_path):
    model = nn.ModuleDict({"bn": nn.BatchNorm2d(3), "net": nn.ModuleDict({"bn": nn.BatchNorm2d(3)})})
    bank = task_statistics(model, TASKS, modules=["bn"])
    path = saved(tmp_path, model["net"], bank=bank)  # type: ignore[arg-type]
    content = read(path)
    content["state_dict"] = {f"net.{name}": value for name, value in content["state_dict"].items()}
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"layer 'bn' has statistics per task"):
        export_task(path, "seg", tmp_path / "one.ckpt")


def test_out_that_exists_is_replaced_only_if_asked(two, tmp_path):
    (tmp_path / "one.ckpt").write_text("old")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        export_task(two[-1], "seg", tmp_path / "one.ckpt")
    assert (tmp_path / "one.ckpt").read_text() == "old"
    export_task(two[-1], "seg", tmp_path / "one.ckpt", overwrite=True)
    assert "state_dict" in read(tmp_path / "one.ckpt")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        export_task(two[-1], "seg", tmp_path, overwrite=True)


def test_the_checkpoint_is_never_written_over(two, tmp_path):
    path = two[-1]
    os.symlink(path, tmp_path / "link.ckpt")
    before = path.read_bytes()
    for out in (path, tmp_path / ".." / tmp_path.name / path.name, tmp_path / "link.ckpt"):
        with pytest.raises(ValueError, match="is the checkpoint itself"):
            export_task(path, "seg", out, overwrite=True)
    assert path.read_bytes() == before


def test_a_format_for_tensors_alone_is_refused(two, tmp_path):
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match="holds tensors only"):
        export_task(two[-1], "seg", tmp_path / "one.safetensors")


def test_a_task_of_which_nothing_was_seen_is_exported_and_told(tmp_path):
    model = fill_statistics(seeded(SmallResNet))
    path = saved(tmp_path, model, bank=task_statistics(model, TASKS))
    with pytest.warns(UserWarning, match=r"all\.ckpt: no batch of task 'seg' had been seen"):
        export_task(path, "seg", tmp_path / "one.ckpt")
    after: dict[str, Tensor] = read(tmp_path / "one.ckpt")["state_dict"]
    assert bits(after["bn1.running_mean"]) == bits(model.bn1.running_mean)  # type: ignore[union-attr, arg-type]
