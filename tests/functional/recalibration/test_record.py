"""A recalibrated file says so, where that disturbs no reader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bn.functional import recalibrate_checkpoint
from lightning_bn.functional.statistics.files import read_checkpoint
from lightning_bn.functional.statistics.recalibration_record import KEY, RecalibratedLayer, recalibrated_in
from tests.checkpoints import read
from tests.models import SmallResNet, images, seeded


def state() -> dict[str, Tensor]:
    return seeded(SmallResNet).state_dict()


def recalibrated(content: Any, folder: Path, name: str = "in.pt", out: str = "out.pt", **options: Any) -> Path:
    torch.save(content, folder / name)
    recalibrate_checkpoint(folder / name, SmallResNet(), [images(8), images(4, seed=1)], folder / out, **options)
    return folder / out


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_layers_are_named_with_their_entry_and_from_how_much(key: str, tmp_path: Path) -> None:
    path = recalibrated({key: state(), "epoch": 3}, tmp_path, modules=["bn1", "head"])
    layers = recalibrated_in(read(path), None)[key]
    assert {name: one[1:] for name, one in layers.items()} == {"bn1": (2, 12), "head.bn": (2, 12)}


def test_a_second_one_of_other_layers_keeps_what_is_known_of_the_first(tmp_path: Path) -> None:
    recalibrated({"state_dict": state()}, tmp_path, modules="bn1")
    out = tmp_path / "twice.pt"
    recalibrate_checkpoint(tmp_path / "out.pt", SmallResNet(), [images(6)], out, modules="head")
    layers = recalibrated_in(read(out), None)["state_dict"]
    assert {name: one[1:] for name, one in layers.items()} == {"bn1": (2, 12), "head.bn": (1, 6)}


@pytest.mark.parametrize("key", [None, "model"])
def test_a_state_dict_and_a_file_of_nothing_else_get_none(key: str | None, tmp_path: Path) -> None:
    content = state() if key is None else {"model": state(), "ema": state()}
    assert list(read(recalibrated(content, tmp_path, key=key))) == list(content)


def test_of_safetensors_it_is_among_the_metadata(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = recalibrated(state(), tmp_path, out="out.safetensors")
    written = read_checkpoint(path)
    assert KEY not in written.content
    assert len(recalibrated_in({}, written.metadata)[""]) == 10


NONSENSE: dict[str, Any] = {
    "a number": 3,
    "another format": {"format": 2, "recalibrated": {"": {"bn": [1.0, 2, 3]}}},
    "a list": {"format": 1, "recalibrated": [1, 2]},
    "other layers": {"format": 1, "recalibrated": {"": {"bn": [1.0, -2, 3], "b": ["x", 1, 1], "c": 4, "d": [1.0]}}},
    "deep": {"format": 1, "recalibrated": {"": []}},
}


@pytest.mark.parametrize("what", NONSENSE)
def test_what_is_no_record_says_nothing(what: str) -> None:
    assert recalibrated_in({KEY: NONSENSE[what]}, None) == {}
    assert recalibrated_in({}, {KEY: "[" * 100_000}) == {}


def test_it_is_read_as_it_was_written() -> None:
    said = {KEY: {"format": 1, "recalibrated": {"": {"bn": [1.0, 2, None]}}}}
    assert recalibrated_in(said, None) == {"": {"bn": RecalibratedLayer(1.0, 2, None)}}
