"""Samples come every so many optimizer steps, and the batches around them are judged."""

import pytest

from lightning_bn.functional.monitoring.cadence import Cadence


def run(every: int, steps: list[int], start: int = 0) -> tuple[list[int], list[int]]:
    """Batches (from 1) after which a sample is taken, and batches that are judged; steps are those after each batch."""
    cadence = Cadence(every, start)
    sampled, judged = [], []
    for batch, step in enumerate(steps, 1):
        if cadence.judges():
            judged.append(batch)
        if cadence.samples(step):
            sampled.append(batch)
    return sampled, judged


def test_one_step_a_batch_is_sampled_every_n_and_judged_before_and_after() -> None:
    assert run(5, list(range(1, 13))) == ([5, 10], [5, 6, 10, 11])


def test_every_step_samples_and_judges_every_batch() -> None:
    assert run(1, list(range(1, 5))) == ([1, 2, 3, 4], [1, 2, 3, 4])


@pytest.mark.parametrize("optimizers", [2, 3])
def test_several_optimizers_step_over_no_sample(optimizers: int) -> None:
    sampled, judged = run(50, [optimizers * batch for batch in range(1, 101)])
    assert len(sampled) == optimizers * 100 // 50
    assert set(sampled) <= set(judged)
    assert {batch + 1 for batch in sampled if batch < 100} <= set(judged)


def test_accumulated_batches_take_no_sample_before_the_first_step_nor_twice() -> None:
    # Four batches a step.
    sampled, judged = run(2, [batch // 4 for batch in range(1, 25)])
    assert sampled == [8, 16, 24]
    assert set(sampled) <= set(judged)


def test_a_resumed_run_goes_on_where_it_was() -> None:
    assert run(5, [8, 9, 10, 11], start=7) == ([3], [3, 4])
