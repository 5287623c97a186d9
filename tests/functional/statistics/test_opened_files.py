"""A checkpoint is opened without reading what is not about BatchNorm, and the bytes say its format."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_bn.functional.statistics.opened_files import batch_norm_names, open_checkpoint
from tests.models import SmallResNet, fill_statistics

STATE = fill_statistics(SmallResNet()).state_dict()
OF_BATCH_NORM = {name for name in STATE if ".bn" in name or name.startswith("bn")}


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_names_are_those_of_layers_with_running_statistics():
    assert set(batch_norm_names(STATE)) == OF_BATCH_NORM < set(STATE)


def test_of_safetensors_only_batch_norm_is_read(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors", {"format": "pt"})
    opened = open_checkpoint(tmp_path / "model.safetensors")
    assert same(opened.content, {name: STATE[name] for name in OF_BATCH_NORM})
    assert opened.kind == "safetensors file"
    assert opened.metadata == {"format": "pt"}
    assert opened.size == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("new", "kind"), [(True, "file of torch.save"), (False, "file of torch.save before 1.6")])
def test_a_file_of_torch_is_all_there(new, kind, tmp_path):
    torch.save(STATE, tmp_path / "model.bin", _use_new_zipfile_serialization=new)
    opened = open_checkpoint(tmp_path / "model.bin")
    assert same(opened.content, STATE)
    assert opened.kind == kind


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_put_together(suffix, tmp_path):
    places = {name: f"model-{index % 3}.{suffix}" for index, name in enumerate(STATE)}
    for file in {*places.values()}:
        part = {name: STATE[name] for name in STATE if places[name] == file}
        (save_file if suffix == "safetensors" else torch.save)(part, tmp_path / file)
    (tmp_path / f"model.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    opened = open_checkpoint(tmp_path)
    assert same(opened.content, {name: STATE[name] for name in OF_BATCH_NORM})
    assert opened.kind == "checkpoint of 3 shards"
    assert len(opened.files) == 4


def test_what_was_read_can_be_changed_and_the_file_stays(tmp_path):
    torch.save(STATE, tmp_path / "model.pt")
    open_checkpoint(tmp_path / "model.pt").content["bn1.running_mean"].fill_(7)
    assert same(torch.load(tmp_path / "model.pt"), STATE)
