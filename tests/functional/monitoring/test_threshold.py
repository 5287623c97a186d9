"""A threshold speaks once, after enough samples, and again only after the value fell far below it."""

import pytest

from lightning_bn.functional.monitoring.threshold import Alarm

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
def test_it_speaks_at_these_samples(in_a_row: int, values: list[float], spoken: list[int]) -> None:
    alarm = Alarm(1.0, in_a_row)
    assert [index for index, value in enumerate(values) if alarm.sounds(value)] == spoken
    interrupted = Alarm(1.0, in_a_row)
    found = []
    for index, value in enumerate(values):
        resumed = Alarm(1.0, in_a_row)
        resumed.load_state_dict(interrupted.state_dict())
        interrupted = resumed
        if interrupted.sounds(value):
            found.append(index)
    assert found == spoken


def test_without_a_threshold_it_never_speaks() -> None:
    assert not any(Alarm(None).sounds(value) for value in (0.0, 1e9, INF, NAN))


def test_forgetting_lets_it_speak_again() -> None:
    alarm = Alarm(1.0, 2)
    assert [alarm.sounds(2.0), alarm.sounds(2.0)] == [False, True]
    alarm.reset()
    assert [alarm.sounds(2.0), alarm.sounds(2.0)] == [False, True]
