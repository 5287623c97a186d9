"""A checkpoint in several files under an index, as Hugging Face's libraries save it, becomes one file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_bn.functional import recalibrate_checkpoint
from tests.callbacks.fits import Net
from tests.functional.recalibration.test_checkpoint import NORMS, batches
from tests.models import seeded
from tests.oracle import assert_all_statistics, layer_inputs

INDEX = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


def sharded(folder: Path, suffix: str, prefix: str = "") -> dict[str, Tensor]:
    """Three files with an index in a folder, and what they hold."""
    state = {f"{prefix}{name}": value for name, value in seeded(Net).state_dict().items()}
    folder.mkdir()
    places = {name: f"model-0000{index % 3 + 1}-of-00003.{suffix}" for index, name in enumerate(state)}
    for file in {*places.values()}:
        part = {name: value.clone() for name, value in state.items() if places[name] == file}
        if suffix == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt", "author": "nobody"})
        else:
            torch.save(part, folder / file)
    (folder / INDEX[suffix]).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    (folder / "config.json").write_text("{}")
    return state


def assert_precise(new: dict[str, Tensor], old: dict[str, Tensor], prefix: str = "") -> None:
    """All is there, in the order of the old one, and the statistics alone are others."""
    assert list(new) == list(old)
    net = Net()
    net.load_state_dict({name.removeprefix(prefix): value for name, value in new.items()})
    assert_all_statistics(net, layer_inputs(net, batches(), NORMS))
    assert all(torch.equal(new[name], old[name]) for name in old if "running" not in name)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("named", ["folder", "index"])
@pytest.mark.parametrize("out", ["model.safetensors", "model.pt"])
def test_shards_become_one_file(suffix: str, named: str, out: str, tmp_path: Path) -> None:
    old = sharded(tmp_path / "saved", suffix)
    before = {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    path = tmp_path / "saved" / INDEX[suffix] if named == "index" else tmp_path / "saved"
    done = recalibrate_checkpoint(path, Net(), batches(), tmp_path / "new" / out)
    new = load_file(tmp_path / "new" / out) if out.endswith("s") else torch.load(tmp_path / "new" / out)
    assert_precise({name: new[name] for name in old}, old)
    assert new.keys() == old.keys()
    if out.endswith("s"):
        with safe_open(tmp_path / "new" / out, "pt") as file:
            said = {"format": "pt", **({"author": "nobody"} if suffix == "safetensors" else {})}
            assert said.items() <= file.metadata().items()
    else:
        assert list(new) == list(old)
    assert (done.shards, done.path) == (3, tmp_path / "new" / out)
    assert "; 3 shards written as one file" in str(done)
    assert {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before


def test_a_network_in_another_model_is_found(tmp_path: Path) -> None:
    old = sharded(tmp_path / "saved", "safetensors", prefix="model.vision.")
    recalibrate_checkpoint(tmp_path / "saved", Net(), batches(), tmp_path / "new.safetensors")
    new = load_file(tmp_path / "new.safetensors")
    assert_precise({name: new[name] for name in old}, old, prefix="model.vision.")


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    save_file(seeded(Net).state_dict(), tmp_path / "saved" / "model.safetensors")
    done = recalibrate_checkpoint(tmp_path / "saved", Net(), batches(), tmp_path / "new.safetensors")
    assert done.shards == 0
    assert "shard" not in str(done)


def test_shards_are_averaged_with_others(tmp_path: Path) -> None:
    old = sharded(tmp_path / "saved", "safetensors")
    torch.save({name: value + value.is_floating_point() for name, value in old.items()}, tmp_path / "other.pt")
    weight = next(iter(old))
    for index, paths in enumerate((["saved", "other.pt"], ["other.pt", "saved"])):
        out = tmp_path / f"{index}.pt"
        done = recalibrate_checkpoint([tmp_path / one for one in paths], Net(), batches(), out)
        torch.testing.assert_close(torch.load(out)[weight], old[weight] + 0.5)
        assert done.shards == (3 if index == 0 else 0)


@pytest.mark.parametrize("out", ["new", "new.json", "new/model.safetensors.index.json"])
def test_a_name_that_is_no_checkpoints_is_refused_with_one_that_is(out: str, tmp_path: Path) -> None:
    sharded(tmp_path / "saved", "safetensors")
    with pytest.raises(
        ValueError, match=r"3 shards of model\.safetensors\.index\.json are written as one .*model\.saf"
    ):
        recalibrate_checkpoint(tmp_path / "saved", Net(), batches(), tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_shard_is_not_overwritten(tmp_path: Path) -> None:
    sharded(tmp_path / "saved", "safetensors")
    part = tmp_path / "saved" / "model-00002-of-00003.safetensors"
    before = part.read_bytes()
    (tmp_path / "link").symlink_to("saved")
    for out in (part, tmp_path / "link" / part.name, tmp_path / "saved" / ".." / "saved" / part.name):
        with pytest.raises(ValueError, match="is one of the shards of"):
            recalibrate_checkpoint(tmp_path / "saved", Net(), batches(), out, overwrite=True)
    assert part.read_bytes() == before


def test_a_shard_that_is_missing_or_of_another_checkpoint_is_named(tmp_path: Path) -> None:
    sharded(tmp_path / "saved", "safetensors")
    part = tmp_path / "saved" / "model-00002-of-00003.safetensors"
    save_file({"other": torch.ones(2)}, part)
    with pytest.raises(ValueError, match=r"is in model-00002-of-00003\.safetensors, but it is not"):
        recalibrate_checkpoint(tmp_path / "saved", Net(), batches(), tmp_path / "new.pt")
    part.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        recalibrate_checkpoint(tmp_path / "saved", Net(), batches(), tmp_path / "new.pt")
    assert not (tmp_path / "new.pt").exists()
