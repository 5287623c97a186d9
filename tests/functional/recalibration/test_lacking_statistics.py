"""Running statistics that a file lacks are what is computed; anything else that it lacks is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.functional import recalibrate_checkpoint
from tests.callbacks.fits import Net
from tests.functional.recalibration.test_checkpoint import NORMS, batches
from tests.models import seeded
from tests.oracle import assert_all_statistics, layer_inputs

ALL = [f"{norm}.{value}" for norm in NORMS for value in ("running_mean", "running_var", "num_batches_tracked")]


def saved(path: Path, without: list[str], prefix: str = "", **more: Tensor) -> dict[str, Tensor]:
    """A state dict that lacks what is named."""
    whole = {name: value + 7 if "num_batches" in name else value for name, value in seeded(Net).state_dict().items()}
    state = {prefix + name: value for name, value in whole.items() if name not in without} | more
    torch.save(state, path)
    return state


def recalibrated(path: Path, **options: Any) -> dict[str, Tensor]:
    out = path.with_name("new.pt")
    done = recalibrate_checkpoint(path, Net(), batches(), out, **options)
    assert done.added
    return torch.load(out)


@pytest.mark.parametrize("prefix", ["", "model.net."])
@pytest.mark.parametrize(
    "without",
    [
        [f"{NORMS[0]}.running_var"],
        [f"{NORMS[0]}.running_mean", f"{NORMS[1]}.running_var"],
        [f"{NORMS[1]}.running_mean", f"{NORMS[1]}.num_batches_tracked"],
        ALL,
    ],
)
def test_a_file_that_lacks_running_statistics_gets_them(without: list[str], prefix: str, tmp_path: Path) -> None:
    old = saved(tmp_path / "old.pt", without, prefix)
    new = recalibrated(tmp_path / "old.pt")
    net = Net()
    net.load_state_dict({name.removeprefix(prefix): value for name, value in new.items()})
    assert_all_statistics(net, layer_inputs(net, batches(), NORMS))
    assert new.keys() - old.keys() == {prefix + name for name in without}
    assert all(torch.equal(new[name], old[name]) for name in old if "running" not in name)


def test_what_was_added_is_said(tmp_path: Path) -> None:
    saved(tmp_path / "old.pt", [f"{NORMS[0]}.running_var", f"{NORMS[0]}.running_mean"])
    done = recalibrate_checkpoint(tmp_path / "old.pt", Net(), batches(), tmp_path / "new.pt")
    assert done.added == (NORMS[0],)
    assert f"; running statistics that the file lacked were added: {NORMS[0]!r}" in str(done)


def test_nothing_is_said_of_a_complete_file(tmp_path: Path) -> None:
    saved(tmp_path / "old.pt", [])
    done = recalibrate_checkpoint(tmp_path / "old.pt", Net(), batches(), tmp_path / "new.pt")
    assert done.added == ()
    assert "lacked" not in str(done)


@pytest.mark.parametrize("value", ["weight", "bias"])
def test_a_file_that_lacks_weights_is_refused_with_their_names_alone(value: str, tmp_path: Path) -> None:
    saved(tmp_path / "old.pt", [f"{NORMS[0]}.{value}", *ALL])
    with pytest.raises(ValueError, match=rf"it lacks '{NORMS[0]}.{value}';"):
        recalibrate_checkpoint(tmp_path / "old.pt", Net(), batches(), tmp_path / "new.pt")
    assert not (tmp_path / "new.pt").exists()


def test_statistics_of_other_channels_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "old.pt", [f"{NORMS[0]}.running_var"], **{f"{NORMS[0]}.running_mean": torch.zeros(99)})
    with pytest.raises(
        ValueError, match=rf"has '{NORMS[0]}.running_mean' of shape \(99,\), and the model has it of \(\d,\)"
    ):
        recalibrate_checkpoint(tmp_path / "old.pt", Net(), batches(), tmp_path / "new.pt")


@pytest.mark.parametrize("options", [{"exclude": NORMS[0]}, {"modules": NORMS[1]}])
def test_layers_that_are_left_out_have_to_be_there(options: dict[str, str], tmp_path: Path) -> None:
    saved(tmp_path / "old.pt", ALL)
    with pytest.raises(ValueError, match=rf"old.pt has no running statistics of '{NORMS[0]}'.*Nothing was written"):
        recalibrate_checkpoint(tmp_path / "old.pt", Net(), batches(), tmp_path / "new.pt", **options)
    assert not (tmp_path / "new.pt").exists()
    saved(tmp_path / "old.pt", [f"{NORMS[1]}.running_mean"])
    assert recalibrated(tmp_path / "old.pt", **options)


def test_there_is_nothing_to_blend_with(tmp_path: Path) -> None:
    saved(tmp_path / "old.pt", ALL)
    with pytest.raises(
        ValueError, match=r"prior=0\.5 blends with the running statistics of old\.pt, and it has none of"
    ):
        recalibrate_checkpoint(tmp_path / "old.pt", Net(), batches(), tmp_path / "new.pt", prior=0.5)
    saved(tmp_path / "old.pt", [])
    done = recalibrate_checkpoint(tmp_path / "old.pt", Net(), batches(), tmp_path / "new.pt", prior=0.5)
    assert done.recalibration.layers


@pytest.mark.parametrize("order", [("old.pt", "other.pt"), ("other.pt", "old.pt")])
def test_in_an_average_any_of_the_files_may_lack_them(order: tuple[str, str], tmp_path: Path) -> None:
    saved(tmp_path / "old.pt", ALL)
    saved(tmp_path / "other.pt", [])
    done = recalibrate_checkpoint([tmp_path / one for one in order], Net(), batches(), tmp_path / "new.pt")
    net = Net()
    net.load_state_dict(torch.load(tmp_path / "new.pt"))
    assert_all_statistics(net, layer_inputs(net, batches(), NORMS))
    assert done.added == tuple(sorted(NORMS))


class WithoutAffine(nn.Sequential):
    """Of its layers a file may hold nothing."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))


@pytest.mark.parametrize("prefix", ["", "net."])
def test_layers_without_weights_are_put_where_the_others_are(prefix: str, tmp_path: Path) -> None:
    whole = WithoutAffine().state_dict()
    torch.save({prefix + name: one for name, one in whole.items() if not name.startswith("1.")}, tmp_path / "old.pt")
    recalibrate_checkpoint(tmp_path / "old.pt", WithoutAffine(), [torch.randn(16, 4)], tmp_path / "new.pt")
    assert torch.load(tmp_path / "new.pt").keys() == {prefix + name for name in whole}


def test_a_layer_alone_without_weights_cannot_be_told_from_nothing(tmp_path: Path) -> None:
    torch.save({"other": torch.ones(2)}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="it lacks"):
        recalibrate_checkpoint(
            tmp_path / "old.pt", nn.BatchNorm1d(4, affine=False), [torch.randn(16, 4)], tmp_path / "new.pt"
        )
