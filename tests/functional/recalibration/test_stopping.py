"""As much data as asked for: batches, samples, or as many as a standard error needs."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_bn.functional import recalibrate
from tests.functional.recalibration.test_standard_error import errors_of
from tests.models import fill_statistics, images, state_bits
from tests.oracle import assert_statistics_of, per_channel

FEWEST = 8


def stream(channels: int = 4, size: int = 32, seed: int = 0, heavy: bool = False):
    """Batches without an end; with a mean of its own each, so that the error falls slowly."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        values = torch.randn(size, channels, generator=generator) + torch.randn(1, channels, generator=generator)
        yield values**3 if heavy else values


def fewest_in_hindsight(batches: list[Tensor], target: float) -> int:
    units = [per_channel(batch) for batch in batches]
    return next(k for k in range(FEWEST, len(units) + 1) if errors_of(units[:k]).largest() <= target)


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
@pytest.mark.parametrize("target", [0.5, 0.3, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_error_asked_for_is_reached_with_few_more_batches_than_needed_in_hindsight(seed, target, heavy):
    result = recalibrate(
        nn.BatchNorm1d(4), itertools.islice(stream(seed=seed, heavy=heavy), 3000), max_standard_error=target
    )
    used = list(itertools.islice(stream(seed=seed, heavy=heavy), result.num_batches))
    assert result.standard_error <= target
    assert result.standard_error == pytest.approx(errors_of([per_channel(batch) for batch in used]).largest(), rel=1e-3)
    assert FEWEST <= result.num_batches <= 1.5 * fewest_in_hindsight(used, target)


def test_small_error_takes_four_times_the_batches_of_twice_the_error():
    counts = [
        recalibrate(nn.BatchNorm1d(2), stream(2, seed=1), max_standard_error=target).num_batches
        for target in (0.2, 0.1)
    ]
    assert counts[1] == pytest.approx(4 * counts[0], rel=0.4)


def test_at_least_8_batches_are_used_before_an_error_is_believed():
    # Identical batches: the error is 0 from the second one on.
    batch = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    assert recalibrate(nn.BatchNorm1d(2), itertools.repeat(batch), max_standard_error=0.5).num_batches == FEWEST


def test_statistics_are_those_of_the_batches_used_and_no_more_are_taken():
    taken: list[Tensor] = []

    def noting():
        for batch in stream():
            taken.append(batch)
            yield batch

    layer = nn.BatchNorm1d(4)
    result = recalibrate(layer, noting(), max_standard_error=0.3)
    assert len(taken) == result.num_batches
    assert_statistics_of(layer, torch.cat(taken).double().T)


def test_error_that_is_not_reached_uses_all_and_is_told():
    result = recalibrate(nn.BatchNorm1d(4), list(itertools.islice(stream(), 20)), max_standard_error=1e-4)
    assert result.num_batches == 20
    assert 1e-4 < result.standard_error < math.inf


@pytest.mark.parametrize(
    ("limits", "batches"),
    [
        ({"num_batches": 12, "max_standard_error": 1e-6}, 12),
        ({"num_batches": 3, "max_standard_error": 100.0}, 3),
        ({"num_batches": 50, "num_samples": 5 * 32}, 5),
        ({"num_batches": 2, "num_samples": 5 * 32}, 2),
        ({"num_samples": 10 * 32, "max_standard_error": 1e-6}, 10),
        ({"num_batches": 50, "num_samples": 40 * 32, "max_standard_error": 100.0}, FEWEST),
    ],
)
def test_what_is_reached_first_ends_the_pass(limits, batches):
    assert recalibrate(nn.BatchNorm1d(4), stream(), **limits).num_batches == batches


@pytest.mark.parametrize(("samples", "batches"), [(1, 1), (32, 1), (33, 2), (96, 3)])
def test_samples_are_taken_in_whole_batches(samples, batches):
    result = recalibrate(nn.BatchNorm1d(4), stream(), num_samples=samples)
    assert (result.num_batches, result.num_samples) == (batches, 32 * batches)


def test_samples_of_batches_of_unequal_size_are_counted():
    result = recalibrate(nn.BatchNorm2d(3), [images(size) for size in (3, 10, 2, 50)], num_samples=14)
    assert (result.num_batches, result.num_samples) == (3, 15)


def test_skipped_batch_has_no_samples():
    result = recalibrate(nn.BatchNorm1d(2), [torch.randn(1, 2), torch.randn(8, 2), torch.randn(8, 2)], num_samples=16)
    assert (result.num_batches, result.num_samples, result.skipped_batches) == (2, 16, 1)


def test_data_that_ended_before_the_samples_asked_for_are_said():
    batches = [images(8), images(8)]
    assert recalibrate(nn.BatchNorm2d(3), batches, num_samples=100).ended_early
    assert not recalibrate(nn.BatchNorm2d(3), batches, num_samples=16).ended_early


@pytest.mark.parametrize(
    "limits",
    [
        {"num_samples": 0},
        {"num_samples": -3},
        {"max_standard_error": 0.0},
        {"max_standard_error": -1.0},
        {"max_standard_error": math.nan},
    ],
    ids=str,
)
def test_budget_that_asks_for_nothing_is_refused_and_nothing_is_changed(limits):
    layer = fill_statistics(nn.BatchNorm2d(3))
    before = state_bits(layer)
    with pytest.raises(ValueError, match=next(iter(limits))):
        recalibrate(layer, [images(8)], **limits)
    assert state_bits(layer) == before


def test_batches_that_are_not_finite_do_not_pass_for_certainty():
    layer = nn.BatchNorm1d(4)
    good = list(itertools.islice(stream(), 100))
    result = recalibrate(layer, [torch.full((32, 4), math.nan)] * FEWEST + good, max_standard_error=0.3)
    assert result.standard_error <= 0.3
    assert result.num_batches > FEWEST + 2


def test_samples_that_cannot_be_counted_are_not_an_endless_pass():
    class Opaque:
        """Has no tensor to count samples by."""

    def forward(model: nn.Module, batch: Opaque) -> Tensor:
        return model(torch.randn(4, 2))

    taken = itertools.count()

    def endless():
        while next(taken) < 200:
            yield Opaque()

    layer = fill_statistics(nn.BatchNorm1d(2))
    before = state_bits(layer)
    with pytest.raises((TypeError, ValueError), match="num_batches"):
        recalibrate(layer, endless(), num_samples=10, forward=forward)
    assert next(taken) < 200
    assert state_bits(layer) == before
