"""Batches of one source are not called unlike by chance, whatever their size; sources that differ are."""

import pytest
import torch
from torch import nn

from lightning_bn.functional import diagnose


def found(samples: int, channels: int, batches: int, seed: int, shift: float = 0.0, rank: int = 0) -> set[str]:
    """Severities of what is said of batches of random numbers, the second of them shifted."""
    generator = torch.Generator().manual_seed(seed)
    given = [torch.randn(samples, rank or channels, generator=generator) for _ in range(batches)]
    if rank:
        mixed = torch.randn(rank, channels, generator=generator)
        given = [one @ mixed for one in given]
    given[1] = given[1] + shift
    net = nn.Sequential(nn.BatchNorm1d(channels))
    return {one.severity for one in diagnose(net, given[0], more_batches=given[1:]) if one.rule == "unlike-inputs"}


@pytest.mark.parametrize(
    ("samples", "channels", "batches", "rank"),
    [(8, 1, 4, 0), (8, 4, 20, 0), (16, 1, 20, 0), (4, 64, 4, 0), (64, 64, 4, 0), (8, 64, 4, 2)],
)
def test_batches_of_one_source_are_not_unlike(samples: int, channels: int, batches: int, rank: int) -> None:
    assert not any(found(samples, channels, batches, seed, rank=rank) for seed in range(50))


@pytest.mark.parametrize(("samples", "shift"), [(32, 0.5), (16, 0.9), (8, 1.5), (4, 2.5)])
def test_sources_that_differ_are_unlike(samples: int, shift: float) -> None:
    severities = [found(samples, 32, 4, seed, shift) for seed in range(20)]
    assert all(severities)
    assert all(one == {"fault" if shift > 0.7 else "advice"} for one in severities)
