"""A layer that a forward uses several times is named where its uses see different inputs, and only there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn.functional import recalibrate
from tests.models import images


class TwoTasks(nn.Module):
    """A shared backbone and a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.BatchNorm2d(3)
        self.heads = nn.ModuleDict({task: nn.BatchNorm2d(3) for task in ("a", "b")})

    def forward(self, batch: dict[str, Tensor]) -> None:
        for task, x in batch.items():
            self.heads[task](self.backbone(x))


def both(shift: float, count: int = 10, size: int = 4) -> list[dict[str, Tensor]]:
    """Standard normal images for task a, and for task b that much further on in one channel."""
    apart = torch.tensor([0.0, shift, 0.0])[:, None, None]
    normal = [torch.randn(2, size, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]
    return [{"a": a, "b": b + apart} for a, b in normal]


def run(model: Any, batch: Any) -> None:
    model(batch)


@pytest.mark.parametrize("shift", [1.5, -4.0, 40.0])
def test_uses_that_lie_apart_are_named_with_their_distance(shift: float) -> None:
    found = recalibrate(TwoTasks().train(), both(shift), forward=run)
    assert found.uses_apart == {"backbone": pytest.approx(abs(shift), rel=0.1)}
    assert f"means differ by up to {found.uses_apart['backbone']:.1f} sigma" in str(found)
    assert str(found).endswith("'backbone'")


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_uses_that_agree_are_not(shift: float) -> None:
    found = recalibrate(TwoTasks().train(), both(shift), forward=run)
    assert found.uses_apart == {}
    assert "apart" not in str(found)


def test_chance_in_small_batches_is_no_distance() -> None:
    layer = nn.BatchNorm1d(64)
    values = [torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(50)]
    found = recalibrate(layer, [list(pair) for pair in values], forward=lambda model, pair: [model(x) for x in pair])
    assert found.uses_apart == {}


def test_one_use_in_each_forward_is_never_apart_however_batches_differ() -> None:
    found = recalibrate(nn.BatchNorm2d(3), [images(8) + 20 * (seed % 2) for seed in range(10)])
    assert found.uses_apart == {}


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "sequential"])
def test_batches_of_a_combined_loader_are_the_batches(mode: Any) -> None:
    loaders = {task: DataLoader(TensorDataset(images(8, seed=seed)), batch_size=4) for seed, task in enumerate("ab")}
    seen: list[Any] = []

    def forward(model: Callable[[Tensor], Any], batch: Any) -> None:
        seen.append(batch)
        model(batch["a"][0] if isinstance(batch, dict) else batch[0])

    found = recalibrate(nn.BatchNorm2d(3), CombinedLoader(loaders, mode), forward=forward)
    assert all(isinstance(batch, list if mode == "sequential" else dict) for batch in seen)
    assert found.num_batches == len(seen) == (4 if mode == "sequential" else 2)


def test_combined_loader_of_one_kind_of_batch_needs_no_forward() -> None:
    loaders = [DataLoader(TensorDataset(images(8, seed=seed)), batch_size=4) for seed in range(2)]
    assert recalibrate(nn.BatchNorm2d(3), CombinedLoader(loaders, "sequential")).num_samples == 16
