"""Checkpoints as files: read without executing anything, in every form; written whole or not at all."""

import json
import os
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_bn.functional import recalibrate_checkpoint, take_snapshot
from lightning_bn.functional.statistics.files import read_checkpoint, snapshot_of_checkpoint
from lightning_bn.functional.statistics.recalibration_record import KEY
from tests.models import SmallResNet, bits, fill_statistics, images, seeded
from tests.versions import knows


class Settings:
    """An object that a checkpoint should not hold."""


def test_object_in_a_file_is_named_and_no_escape_code_printed(tmp_path):
    torch.save({"state_dict": nn.BatchNorm1d(2).state_dict(), "settings": Settings()}, tmp_path / "old.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"old\.pt holds objects .*\(\S*test_files\.Settings\)") as caught:
        read_checkpoint(tmp_path / "old.pt")
    assert "\x1b" not in str(caught.value)


def test_whole_module_in_a_file_is_named(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "old.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(tmp_path / "old.pt")


NONE = {
    b"": "is empty",
    b"hello world": "is not a checkpoint",
    b"PK\x03\x04 cut off": "cannot be read .*: it is incomplete",
}


@pytest.mark.parametrize("content", NONE, ids=["empty", "text", "cut off"])
def test_file_that_is_no_checkpoint_is_an_error_with_its_name(tmp_path, content):
    (tmp_path / "old.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"old\.pt {NONE[content]}"):
        read_checkpoint(tmp_path / "old.pt")


@pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:TypedStorage is deprecated")
def test_sharded_folder_is_an_error_with_the_way_to_one_file(tmp_path):
    alone = {"no_dist": True} if knows(save, "no_dist") else {}
    save(nn.BatchNorm1d(2).state_dict(), storage_writer=FileSystemWriter(tmp_path / "sharded"), **alone)
    with pytest.raises(IsADirectoryError, match=r"sharded is a checkpoint in many parts.*dcp_to_torch"):
        read_checkpoint(tmp_path / "sharded")
    with pytest.raises(IsADirectoryError, match="sharded is a checkpoint in many parts"):
        recalibrate_checkpoint(tmp_path / "sharded", nn.BatchNorm1d(2), [torch.ones(2, 2)], tmp_path / "new.pt")


def test_file_that_is_not_there_is_an_error_with_its_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere.pt")


def test_optimizer_states_are_no_state_dicts(tmp_path):
    layer = nn.BatchNorm1d(2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_checkpoint(tmp_path / "old.pt")


# A snapshot from a file


def test_counters_that_a_file_lacks_are_unknown(tmp_path):
    model = fill_statistics(seeded(SmallResNet))
    state = {name: value for name, value in model.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(state, tmp_path / "old.pt")
    read, entry = snapshot_of_checkpoint(tmp_path / "old.pt", take_snapshot(SmallResNet()))
    assert bits(read.var) == bits(take_snapshot(model).var)
    assert read.num_batches_tracked.tolist() == [-1] * len(read)
    assert str(entry) == ""


def test_layer_that_is_the_model_itself_is_read(tmp_path):
    layer = fill_statistics(nn.BatchNorm1d(3))
    torch.save({"model": layer.state_dict()}, tmp_path / "old.pt")
    read, entry = snapshot_of_checkpoint(tmp_path / "old.pt", take_snapshot(nn.BatchNorm1d(3)))
    assert read.same_bits(take_snapshot(layer))
    assert str(entry) == "entry 'model'"


@pytest.mark.parametrize("value", [7e4, 3e38], ids=str)
def test_values_that_the_dtype_of_the_model_cannot_hold_are_read_as_they_are(tmp_path, value):
    layer = nn.BatchNorm1d(3)
    layer.running_var.fill_(value)
    torch.save(layer.state_dict(), tmp_path / "old.pt")
    read, _ = snapshot_of_checkpoint(tmp_path / "old.pt", take_snapshot(nn.BatchNorm1d(3).half()))
    assert read.var.tolist() == layer.running_var.tolist()


def test_file_of_a_part_fits_where_that_part_is_selected(tmp_path):
    part = fill_statistics(seeded(SmallResNet))
    torch.save(part.state_dict(), tmp_path / "part.pt")
    whole = nn.ModuleDict({"net": SmallResNet(), "top": nn.BatchNorm1d(7)})
    with pytest.raises(ValueError, match=r"lacks 'net\.bn1\.running_mean'.*or of a part of this one.*select that part"):
        snapshot_of_checkpoint(tmp_path / "part.pt", take_snapshot(whole))
    read, entry = snapshot_of_checkpoint(tmp_path / "part.pt", take_snapshot(whole, "net"))
    assert bits(read.mean) == bits(take_snapshot(part).mean)
    assert "'net.bn1.running_mean' read from 'bn1.running_mean'" in str(entry)


@pytest.mark.parametrize("start", ["", "_orig_mod.", "module."])
def test_layers_of_the_same_name_go_before_those_of_another(tmp_path, start):
    both = nn.ModuleDict({name: fill_statistics(seeded(SmallResNet)) for name in ("student", "teacher")})
    both["teacher"].bn1.running_mean.add_(1)
    torch.save({start + name: value for name, value in both.state_dict().items()}, tmp_path / "old.pt")
    for name in both:
        read, _ = snapshot_of_checkpoint(tmp_path / "old.pt", take_snapshot(both, name))
        assert read.same_bits(take_snapshot(both, name))


def test_key_and_prefix_choose(tmp_path):
    both = nn.ModuleDict({name: fill_statistics(seeded(SmallResNet)) for name in ("student", "teacher")})
    both["teacher"].bn1.running_mean.add_(1)
    torch.save({"a": {"b": both.state_dict()}, "ema": both["student"].state_dict()}, tmp_path / "old.pt")
    like = take_snapshot(SmallResNet())
    read, _ = snapshot_of_checkpoint(tmp_path / "old.pt", like, key="a.b", prefix="teacher.")
    assert bits(read.mean) == bits(take_snapshot(both["teacher"]).mean)
    read, _ = snapshot_of_checkpoint(tmp_path / "old.pt", like, key="ema")
    assert bits(read.mean) == bits(take_snapshot(both["student"]).mean)


# safetensors


def written_by_hand(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """By the format's own page: the length of the header, the header, the bytes."""
    kinds = {torch.float32: "F32", torch.int64: "I64"}
    header, data = {"__metadata__": metadata}, b""
    for name, value in sorted(state.items(), key=lambda item: -item[1].element_size()):
        content = value.contiguous().numpy().tobytes()
        place = [len(data), len(data) + len(content)]
        header[name] = {"dtype": kinds[value.dtype], "shape": list(value.shape), "data_offsets": place}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def header_of(path: Path) -> dict:
    content = path.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def test_safetensors_stays_safetensors_with_its_metadata(tmp_path):
    pytest.importorskip("safetensors")
    model, path = fill_statistics(seeded(SmallResNet)), tmp_path / "model.safetensors"
    written_by_hand(path, model.state_dict(), {"format": "pt", "license": "mine"})
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], path, overwrite=True)
    metadata = header_of(path)["__metadata__"]
    assert "recalibrated" in metadata.pop(KEY)
    assert metadata == {"format": "pt", "license": "mine"}
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt")
    assert set(torch.load(tmp_path / "new.pt", weights_only=True)) == set(model.state_dict())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "new.pt"]


def test_torch_file_becomes_safetensors_where_it_is_tensors_only(tmp_path):
    pytest.importorskip("safetensors")
    state, model = fill_statistics(seeded(SmallResNet)).state_dict(), SmallResNet()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "more.ckpt")
    recalibrate_checkpoint(tmp_path / "plain.pt", model, [images(8)], tmp_path / "new.safetensors")
    read = read_checkpoint(tmp_path / "new.safetensors").content
    assert {name: bits(value) for name, value in read.items()} == {n: bits(v) for n, v in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"holds tensors only.*'state_dict', 'epoch'.*another suffix, such as '\.ckpt'"
    ):
        recalibrate_checkpoint(tmp_path / "more.ckpt", model, [images(8)], tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_safetensors_that_is_cut_off_is_an_error_with_its_name(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "old.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match=r"old\.safetensors cannot be read"):
        read_checkpoint(tmp_path / "old.safetensors")


def test_without_the_library_safetensors_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "model.safetensors"
    written_by_hand(path, nn.BatchNorm1d(2).state_dict(), {})
    before = path.read_bytes()
    with pytest.raises(ModuleNotFoundError, match=r"model\.safetensors.*pip install 'lightning-bn\[safetensors\]'"):
        recalibrate_checkpoint(path, nn.BatchNorm1d(2), [torch.ones(2, 2)], path, overwrite=True)
    torch.save(nn.BatchNorm1d(2).state_dict(), tmp_path / "old.pt")
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        recalibrate_checkpoint(tmp_path / "old.pt", nn.BatchNorm1d(2), [torch.ones(2, 2)], tmp_path / "a.safetensors")
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["pickle", "TorchScript"])
def test_files_of_other_kinds_are_refused_without_the_advice_to_execute_them(tmp_path, kind):
    path = tmp_path / "a.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    else:
        torch.jit.script(nn.BatchNorm1d(2)).save(path)
    with pytest.raises(ValueError, match=r"a\.pt cannot be read as a file of torch\.save") as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value)


def test_suffix_says_the_format_whatever_its_case(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = nn.BatchNorm1d(2).state_dict()
    safetensors.save_file(state, tmp_path / "A.SAFETENSORS")
    assert read_checkpoint(tmp_path / "A.SAFETENSORS").content.keys() == state.keys()


def test_bytes_say_the_format_of_what_is_read_and_the_suffix_of_what_is_written(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    state = SmallResNet().state_dict()
    safetensors.save_file(state, tmp_path / "model.bin")
    torch.save(state, tmp_path / "other.safetensors")
    for name in ("model.bin", "other.safetensors"):
        assert read_checkpoint(tmp_path / name).content.keys() == state.keys()
        recalibrate_checkpoint(tmp_path / name, SmallResNet(), [images(8)], tmp_path / f"new-{name}")
    assert torch.load(tmp_path / "new-model.bin", weights_only=True).keys() == state.keys()
    assert safetensors.load_file(tmp_path / "new-other.safetensors").keys() == state.keys()


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", "/dev/zero"):
        with pytest.raises(OSError, match="is not a regular file"):
            read_checkpoint(path)
