"""Values in a file that cannot be loaded as those of the model: refused by name, alone and in an average."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_bn.functional import recalibrate_checkpoint, take_snapshot
from lightning_bn.functional.statistics.files import snapshot_of_checkpoint
from tests.callbacks.fits import Net
from tests.functional.recalibration.test_checkpoint import NORMS, batches
from tests.models import fill_statistics, seeded

Change = Callable[[Tensor], Tensor]
UNLIKE: dict[str, tuple[Change, str]] = {
    "meta": (lambda value: value.to("meta"), "has no values"),
    "sparse": (lambda value: value.to_sparse(), "is a sparse tensor"),
    "quantized": (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "is a quantized tensor"),
    "int8": (lambda value: (value * 100).to(torch.int8), r"holds whole numbers \(torch.int8\)"),
    "int64": (lambda value: (value * 100).long(), r"holds whole numbers \(torch.int64\)"),
    "float8": (lambda value: value.to(torch.float8_e4m3fn), "holds fractions of 8 bits"),
    "complex": (lambda value: value.to(torch.complex64), "holds complex numbers"),
}


def changed(path: Path, name: str, change: Change) -> Path:
    state = fill_statistics(seeded(Net)).state_dict()
    torch.save({**state, name: change(state[name])}, path)
    return path


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("part", ["weight", "running_mean"])
@pytest.mark.parametrize("kind", UNLIKE)
def test_what_is_no_value_of_the_model_is_refused_by_name(kind: str, part: str, tmp_path: Path) -> None:
    change, why = UNLIKE[kind]
    name = f"{NORMS[0]}.{part}"
    bad = changed(tmp_path / "bad.pt", name, change)
    well = changed(tmp_path / "well.pt", name, torch.clone)
    for paths in ([bad], [well, bad], [bad, well]):
        with pytest.raises(ValueError, match=rf"bad\.pt: '{name}' {why}.*Nothing was written"):
            recalibrate_checkpoint(paths, Net(), batches(), tmp_path / "new.pt")
    assert not (tmp_path / "new.pt").exists()
    if part == "running_mean":
        with pytest.raises(ValueError, match=rf"bad\.pt: '{name}' {why}"):
            snapshot_of_checkpoint(bad, take_snapshot(Net()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_fractions_are_values(dtype: torch.dtype, tmp_path: Path) -> None:
    path = changed(tmp_path / "old.pt", f"{NORMS[0]}.weight", lambda value: value.to(dtype))
    recalibrate_checkpoint([path, path], Net(), batches(), tmp_path / "new.pt")
    assert torch.load(tmp_path / "new.pt")[f"{NORMS[0]}.weight"].dtype == dtype


@pytest.mark.parametrize(
    "callbacks",
    [
        {"BatchNormFreezer{}": {"settings": None, "report": 7}, "TaskBatchNorm": {"tasks": 5}, 5: {}},
        {"BatchNormFreezer": {"report": {"layers": [[], 3]}}, "TaskBatchNorm{}": {"tasks": [["a"], 3]}},
        {"BatchNormFreezer": None, "TaskBatchNorm": [1]},
        7,
    ],
)
def test_states_of_callbacks_that_are_none_say_nothing(callbacks: Any, tmp_path: Path) -> None:
    content = {"state_dict": seeded(Net).state_dict(), "callbacks": callbacks}
    torch.save(content, tmp_path / "old.pt")
    done = recalibrate_checkpoint(tmp_path / "old.pt", Net(), batches(), tmp_path / "new.pt")
    assert done.recalibration.layers == tuple(NORMS)
    assert not done.tasks_left
