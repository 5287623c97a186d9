"""When a freeze is on: a pure function of epoch, step and the number of epochs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bn.functional import FreezeSchedule

EPOCHS = st.none() | st.integers(-6, 6)
STEPS = st.none() | st.integers(0, 30)


def made(*bounds: int | None) -> FreezeSchedule | None:
    try:
        return FreezeSchedule(*bounds)
    except ValueError:
        return None


@given(EPOCHS, EPOCHS, STEPS, STEPS, st.integers(1, 6), st.integers(1, 5))
def test_it_is_on_where_every_bound_allows_it(
    start_epoch: int | None,
    stop_epoch: int | None,
    start_step: int | None,
    stop_step: int | None,
    max_epochs: int,
    steps_per_epoch: int,
) -> None:
    schedule = made(start_epoch, stop_epoch, start_step, stop_step)
    if schedule is None:
        return
    # A list of epochs and steps, sliced as Python slices: negative bounds count from the end there too.
    epochs = list(range(max_epochs))[start_epoch:stop_epoch]
    steps = range(max_epochs * steps_per_epoch)[start_step:stop_step]
    for step in range(max_epochs * steps_per_epoch):
        epoch = step // steps_per_epoch
        assert schedule.is_on(epoch, step, max_epochs) == (epoch in epochs and step in steps)


@given(EPOCHS, EPOCHS, STEPS, STEPS)
def test_what_is_refused_is_never_on(
    start_epoch: int | None, stop_epoch: int | None, start_step: int | None, stop_step: int | None
) -> None:
    if made(start_epoch, stop_epoch, start_step, stop_step) is None:
        assert any(
            not list(range(length))[start:stop]
            for start, stop, length in ((start_epoch, stop_epoch, 6), (start_step, stop_step, 30))
        )


@given(st.integers(0, 9), st.integers(0, 99))
def test_without_bounds_it_is_always_on(epoch: int, step: int) -> None:
    assert FreezeSchedule().is_on(epoch, step, None)
    assert FreezeSchedule().always
    assert not FreezeSchedule().counts_from_the_end


@pytest.mark.parametrize("max_epochs", [None, -1])
@pytest.mark.parametrize("bounds", [{"start_epoch": -1}, {"stop_epoch": -2}, {"start_epoch": 1, "stop_epoch": -2}])
def test_counting_from_an_unknown_end_is_an_error_that_says_what_to_do(
    bounds: dict[str, int], max_epochs: int | None
) -> None:
    schedule = FreezeSchedule(**bounds)
    assert schedule.counts_from_the_end
    with pytest.raises(ValueError, match=rf"max_epochs={max_epochs}.*set max_epochs, or use start_step and stop_step"):
        schedule.is_on(0, 0, max_epochs)


def test_an_end_that_is_not_known_does_not_matter_to_other_bounds() -> None:
    assert FreezeSchedule(start_epoch=1, stop_step=9).is_on(1, 5, None)
    assert not FreezeSchedule(start_epoch=1, stop_step=9).is_on(1, 9, -1)


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (FreezeSchedule(), "always"),
        (FreezeSchedule(start_epoch=-20), "from epoch -20"),
        (FreezeSchedule(stop_epoch=7), "before epoch 7"),
        (FreezeSchedule(start_step=12_000, stop_step=24_000), "from step 12,000, before step 24,000"),
    ],
)
def test_it_reads_in_plain_words(schedule: FreezeSchedule, text: str) -> None:
    assert str(schedule) == text


@pytest.mark.parametrize(
    "bounds",
    [
        {"start_epoch": 2, "stop_epoch": 2},
        {"start_epoch": 3, "stop_epoch": 1},
        {"start_epoch": -1, "stop_epoch": -1},
        {"start_step": 5, "stop_step": 5},
        {"start_step": -1},
        {"stop_step": -1},
    ],
)
def test_what_can_never_be_on_is_refused_by_name(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="=".join(map(str, next(iter(bounds.items()))))):
        FreezeSchedule(**bounds)
