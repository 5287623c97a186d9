"""`lightning-bn diff` compares what two files say of the same layers, under whatever names."""

import math
import re

import pytest
import torch
from torch import nn

from lightning_bn.functional import MEASURES, drift, take_snapshot
from tests.models import SmallResNet, images, seeded

NAN = float("nan")


@pytest.fixture
def later(trained):
    """The same network after 20 more updates from inputs of another scale."""
    model = seeded(SmallResNet)
    model.load_state_dict(trained)
    for step in range(20):
        model(3 * images(seed=100 + step) + 1)
    return {name: value.clone() for name, value in model.state_dict().items()}


def loaded(state):
    model = seeded(SmallResNet)
    model.load_state_dict(state)
    return take_snapshot(model)


@pytest.mark.parametrize("measure", MEASURES)
def test_drift_is_that_of_the_package(measure, trained, later, save, found):
    code, said = found("diff", save(trained, "a.pt"), save(later, "b.pt"), "--measure", measure)
    expected = {name: one.abs() for name, one in drift(loaded(trained), loaded(later), measure).items()}
    assert code == 0
    assert {one["name"] for one in said["layers"]} == set(expected)
    for one in said["layers"]:
        values = expected[one["name"]]
        assert math.isclose(one["drift"], values.max().item(), rel_tol=1e-9)
        assert math.isclose(one["mean_drift"], values.mean().item(), rel_tol=1e-9)
        assert one["channel"] == int(values.argmax())
        assert one["updates"] == [60, 80]
    drifts = [one["drift"] for one in said["layers"]]
    assert drifts == sorted(drifts, reverse=True)


PREFIXES = ["model.", "module.", "_forward_module.", "_orig_mod.", "model._orig_mod.", "module.net.backbone."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("turned", [False, True])
def test_names_are_matched_across_prefixes_and_it_is_said(prefix, turned, trained, later, save, found):
    files = [save(trained, "a.pt"), save({prefix + name: value for name, value in later.items()}, "b.pt")]
    code, said = found("diff", *(reversed(files) if turned else files))
    assert (code, len(said["layers"]), said["only_first"], said["only_second"]) == (0, 10, [], [])
    [sentence] = said["assumed"]
    assert "bn1" in sentence
    assert prefix + "bn1" in sentence


def test_two_prefixes_are_matched_with_each_other(trained, later, save, found):
    first = save({"student." + name: value for name, value in trained.items()}, "a.pt")
    _, said = found("diff", first, save({"teacher." + name: value for name, value in later.items()}, "b.pt"))
    assert len(said["layers"]) == 10
    assert "'student.'" in said["assumed"][0]
    assert "'teacher.'" in said["assumed"][0]


def test_nothing_is_assumed_of_the_same_names(trained, later, save, found):
    assert found("diff", save(trained, "a.pt"), save(later, "b.pt"))[1]["assumed"] == []


def test_several_ways_to_match_are_told(trained, save, found):
    twice = {f"{who}.{name}": value for who in ("student", "pupil") for name, value in trained.items()}
    _, said = found("diff", save(trained, "a.pt"), save(twice, "b.pt"))
    assert any("'student.'" in one and "--modules" in one for one in said["assumed"])


def test_a_file_is_the_same_as_itself(trained, save, command, found):
    path = save(trained)
    code, said = command("diff", path, path, "--fail-above", "0")
    assert code == 0
    assert " ".join(said.split()).startswith(
        "file.ckpt to file.ckpt: the running statistics of 10 BatchNorm layers are the same Their counters of updates"
    )
    assert all(one["identical"] for one in found("diff", path, path)[1]["layers"])


@pytest.mark.parametrize(("above", "code"), [(0.1, 1), (1e9, 0)])
def test_a_threshold_makes_it_a_check(above, code, trained, later, save, command):
    given, said = command("diff", save(trained, "a.pt"), save(later, "b.pt"), "--fail-above", above)
    assert given == code
    assert ("beyond 0.1 (jeffreys): bn1" in " ".join(said.split())) == bool(code)


def without(state, layer):
    return {name: value for name, value in state.items() if not name.startswith(layer)}


def wider(state):
    return {**state, **{f"bn1.running_{part}": torch.ones(6) for part in ("mean", "var")}}


def with_nan(state):
    state["bn1.running_mean"][0] = NAN
    return state


DIFFERENT = {
    "layer of the first only": (lambda state: (state, without(state, "head")), "1 layer in a.pt only: head.bn."),
    "layer of the second only": (lambda state: (without(state, "head"), state), "1 layer in b.pt only: head.bn."),
    "other channels": (lambda state: (state, wider(state)), "Other numbers of channels: bn1 (4 and 6)."),
    "not finite": (lambda state: (dict(state), with_nan({k: v.clone() for k, v in state.items()})), "beyond 1e+09"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_cannot_be_compared_is_said_and_fails_a_check(what, state, save, command):
    make, sentence = DIFFERENT[what]
    first, second = make(state)
    paths = save(first, "a.pt"), save(second, "b.pt")
    code, said = command("diff", *paths, "--fail-above", "1e9")
    assert code == 1
    assert sentence in " ".join(said.split())
    assert command("diff", *paths)[0] == 0


def test_counters_are_told(trained, later, save, command):
    _, said = command("diff", save(trained, "a.pt"), save(later, "b.pt"))
    assert "Each layer was updated 20 times more in the second file." in said


def test_counters_that_went_back_are_told(trained, state, save, command):
    state["bn1.num_batches_tracked"].fill_(3)
    state["head.bn.num_batches_tracked"].fill_(70)
    _, said = command("diff", save(trained, "a.pt"), save(state, "b.pt"))
    assert "Fewer updates than in the first file: 1 layer (bn1), reset or of another run." in said
    assert "The others were updated 0 to 10 times more in the second file." in said


def test_equal_counters_of_other_statistics_are_told(trained, state, save, command):
    state["bn1.running_mean"] += 1
    _, said = command("diff", save(trained, "a.pt"), save(state, "b.pt"))
    said = " ".join(said.split())
    assert "Counters of updates are equal but statistics differ in 1 layer (bn1): they are of another run" in said
    assert "No layer was updated" not in said
    state["head.bn.num_batches_tracked"] += 1
    _, said = command("diff", save(trained, "a.pt"), save(state, "b.pt"))
    assert "statistics differ in 1 layer (bn1)" in " ".join(said.split())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_layer_that_is_not_whole_is_a_fault_of_its_file(turned, prefix, trained, state, save, command):
    del state["bn1.running_var"]
    paths = [save(trained, "a.pt"), save({prefix + name: value for name, value in state.items()}, "b.pt")]
    code, said = command("diff", *(reversed(paths) if turned else paths))
    said = " ".join(said.replace("\\\n", " ").split())
    assert code == 1
    assert "of 9 BatchNorm layers are the same, and 1 cannot be compared" in said
    assert "1 layer of b.pt is not whole: bn1 has running_mean without running_var." in said
    assert "only" not in said
    assert re.search(r"lightning-bn inspect \S*b\.pt$", said)


def test_the_next_step_is_the_command_that_asks_the_data(trained, later, save, command):
    path = save({"state_dict": trained, "ema": later}, "b.pt")
    _, said = command("diff", save(trained, "a.pt"), path, "--keys", "", "ema")
    assert f"--ckpt_path {path} --key ema --out b-precise.pt" in " ".join(said.replace("\\\n", " ").split())


@pytest.mark.parametrize("measure", MEASURES)
def test_a_negative_variance_has_no_ratio(measure, trained, state, save, command, found):
    state["bn1.running_var"][0] = -0.01
    paths = save(trained, "a.pt"), save(state, "b.pt")
    _, said = command("diff", *paths, "--measure", measure)
    assert "moved most at bn1, negative variance" in " ".join(said.split())
    assert "x-" not in said
    assert found("diff", *paths, "--measure", measure)[1]["layers"][0]["drift"] == "nan"


def test_the_worst_layer_is_said_in_plain_units(trained, later, save, command):
    _, said = command("diff", save(trained, "a.pt").name, save(later, "b.pt").name)
    first = " ".join(said.split("\n\n")[0].split())
    assert re.fullmatch(
        r"a.pt to b.pt: running statistics of 10 BatchNorm layers moved most at bn1, variance x\d\S*, mean \S+ sigma",
        first,
    )
    assert max(map(len, said.splitlines())) <= 80


def test_state_dicts_are_chosen_by_their_keys(trained, later, save, found):
    path = save({"state_dict": trained, "current_model_state": later})
    assert found("diff", path, path, "--keys", "state_dict", "current_model_state")[1]["layers"][0]["drift"] > 0.1
    code, said = found("diff", path, path, "--keys", "state_dict", "ema")
    assert code == 2
    assert "'ema'" in said["error"]
    assert "'current_model_state'" in said["error"]


def test_where_a_file_has_several_the_one_that_was_taken_is_said(trained, later, save, found):
    path = save({"state_dict": trained, "ema": later})
    assert "'state_dict' was taken; there is 'ema' too" in found("diff", path, path)[1]["assumed"][0]


def test_layers_are_chosen_by_patterns(trained, later, save, found):
    paths = save(trained, "a.pt"), save({f"model.{name}": one for name, one in without(later, "head").items()}, "b.pt")
    _, said = found("diff", *paths, "--modules", "layer2", "layer10")
    assert {one["name"] for one in said["layers"]} == {f"layer{i}.0.bn{j}" for i in (2, 10) for j in (1, 2)}
    assert said["only_first"] == []
    assert found("diff", *paths, "--modules", "**")[1]["only_first"] == ["head.bn"]
    assert found("diff", *paths, "--modules", "layer7")[0] == 2


def test_files_of_different_models_cannot_be_compared(trained, save, command):
    other = save({f"layer.{name}": value for name, value in nn.BatchNorm1d(2).state_dict().items()}, "b.pt")
    code, said = command("diff", save(trained, "a.pt"), other)
    assert code == 2
    assert "they are of different models" in said


@pytest.mark.parametrize("threshold", ["-1", "nan", "much"])
def test_a_threshold_that_is_none_is_refused(threshold, trained, save, command):
    path = save(trained)
    code, said = command("diff", path, path, "--fail-above", threshold)
    assert code == 2
    assert "argument --fail-above" in said


def test_a_measure_that_is_none_is_refused_with_those_that_there_are(trained, save, command):
    path = save(trained)
    code, said = command("diff", path, path, "--measure", "cosine")
    assert code == 2
    assert "jeffreys, wasserstein" in said


@pytest.mark.parametrize("name", MEASURES)
def test_help_lists_every_measure(name, command, capsys):
    with pytest.raises(SystemExit, match="0"):
        command("diff", "--help")
    assert f"\n  {name} " in capsys.readouterr().out
