"""A threshold triggers once, after enough samples, and again only after the value fell far below it."""

import pytest

from lightning_bn.functional.monitoring.threshold import Threshold

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("in_a_row", "values", "spoken"),
    [
        (1, [0.5, 1.1, 3.0, 0.9, 1.2], [1]),
        (1, [1.0, 1.0], []),
        (1, [2.0, 0.51, 2.0], [0]),
        (1, [2.0, 0.49, 2.0], [0, 2]),
        (2, [2.0, 0.9, 2.0, 2.0, 2.0], [3]),
        (2, [2.0, 2.0, 0.4, 2.0, 2.0], [1, 4]),
        (2, [2.0, 2.0, 0.4, 2.0], [1]),
        (1, [NAN, NAN], [0]),
        (2, [INF, NAN], [1]),
    ],
)
def test_it_triggers_at_these_samples(in_a_row: int, values: list[float], spoken: list[int]) -> None:
    threshold = Threshold(1.0, in_a_row)
    assert [index for index, value in enumerate(values) if threshold.triggers(value)] == spoken
    interrupted = Threshold(1.0, in_a_row)
    found = []
    for index, value in enumerate(values):
        resumed = Threshold(1.0, in_a_row)
        resumed.load_state_dict(interrupted.state_dict())
        interrupted = resumed
        if interrupted.triggers(value):
            found.append(index)
    assert found == spoken


def test_without_a_threshold_it_never_triggers() -> None:
    assert not any(Threshold(None).triggers(value) for value in (0.0, 1e9, INF, NAN))


def test_forgetting_lets_it_speak_again() -> None:
    threshold = Threshold(1.0, 2)
    assert [threshold.triggers(2.0), threshold.triggers(2.0)] == [False, True]
    threshold.load_state_dict({})
    assert [threshold.triggers(2.0), threshold.triggers(2.0)] == [False, True]


def test_a_state_with_unknown_keys_or_without_known_ones_is_read() -> None:
    threshold = Threshold(1.0)
    assert threshold.triggers(2.0)
    state = threshold.state_dict()
    assert state["format"] == 1
    threshold.load_state_dict({**state, "later": 7})
    assert not threshold.triggers(2.0)
    threshold.load_state_dict({})
    assert threshold.triggers(2.0)
