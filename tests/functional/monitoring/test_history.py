"""Drift over time: bounded, whole, and the same after a checkpoint."""

import io
from collections import Counter

import pytest
import torch
from torch import Tensor

from lightning_bn.functional.monitoring.history import DriftHistory

NAMES = ("a", "b")


def row(value: float) -> Tensor:
    return torch.tensor([value, -value], dtype=torch.float64)


def filled(count: int, most: int = 1000) -> DriftHistory:
    history = DriftHistory(most)
    for step in range(count):
        history.append(step, step // 10, NAMES, row(step))
    return history


def test_an_empty_history_has_no_samples() -> None:
    history = DriftHistory()
    assert len(history) == 0
    assert history.values().shape == (0, 0)


def test_samples_are_rows_and_layers_columns() -> None:
    history = filled(3)
    assert history.names == NAMES
    assert history.steps == [0, 1, 2]
    assert history.epochs == [0, 0, 0]
    assert history.values().tolist() == [[0.0, -0.0], [1.0, -1.0], [2.0, -2.0]]
    assert history.values().dtype == torch.float64


@pytest.mark.parametrize("most", [2, 3, 10, 11, 100])
@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 12, 57, 500])
def test_it_never_keeps_more_than_asked_nor_loses_the_newest(most: int, count: int) -> None:
    history = filled(count, most)
    assert len(history) <= most
    assert len(history) >= min(count, most // 2)
    assert history.steps[-1] == count - 1
    assert history.steps == sorted(set(history.steps))
    # Rows, steps and epochs are still of each other.
    assert history.values()[:, 0].tolist() == history.steps
    assert history.epochs == [step // 10 for step in history.steps]


def test_a_full_history_still_covers_the_whole_run() -> None:
    history = filled(10_000, 100)
    assert history.steps[0] <= 200
    gaps = torch.tensor(history.steps).diff()
    assert int(gaps.max()) <= 256


def test_other_layers_start_a_new_history() -> None:
    history = filled(5)
    history.append(7, 0, ("c",), torch.tensor([1.0], dtype=torch.float64))
    assert history.names == ("c",)
    assert history.steps == [7]
    assert history.values().tolist() == [[1.0]]


def test_marks_are_bounded_too() -> None:
    history = DriftHistory(10)
    history.mark(0, "a", "frozen from the start")
    for step in range(1000):
        history.mark(step, "a", "reset")
    assert 0 < len(history.marks) <= 100
    assert history.marks[0][1:] == ("a", "frozen from the start")
    assert history.marks[1][1:] == ("a", "reset")
    assert all(isinstance(mark, tuple) for mark in history.marks)


def test_of_too_many_marks_all_of_a_step_stay_or_go_and_the_steps_are_spread_evenly() -> None:
    history, layers = DriftHistory(20), [f"layer{index}" for index in range(16)]
    for step in range(100, 10_001, 100):
        for layer in layers:
            history.mark(step, layer, "recalibrated")
    assert len(history.marks) <= 200
    assert history.marks_dropped == 1600 - len(history.marks)
    assert DriftHistory.from_state_dict(history.state_dict()).marks_dropped == history.marks_dropped
    of_steps = Counter(step for step, _, _ in history.marks)
    assert {*of_steps.values()} == {16}
    steps = [*of_steps]
    assert steps[-1] == 10_000
    assert len(steps) >= 5
    gaps = torch.tensor([0, *steps]).diff()
    assert int(gaps.max()) <= 2000, "a fifth of the run"


def test_too_many_marks_do_not_leave_a_layer_warming_up_forever() -> None:
    history = DriftHistory(10)
    history.mark(5, "a", "warming up")
    history.mark(50, "a", "warmed up")
    for step in range(51, 1000):
        history.mark(step, "b", "reset")
    assert [mark for mark in history.marks if mark[1] == "a"] == [(5, "a", "warming up"), (50, "a", "warmed up")]
    for step in range(1000, 3000):
        history.mark(step, "b", "warming up")
        history.mark(step, "b", "warmed up")
    assert len(history.marks) <= 100
    assert history.marks[-1] == (2999, "b", "warmed up")


@pytest.mark.parametrize("count", [0, 1, 25])
def test_a_checkpoint_read_without_executing_anything_gives_it_back(count: int) -> None:
    history = filled(count, 20)
    history.mark(3, "b", "frozen")
    file = io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    back = DriftHistory.from_state_dict(torch.load(file, weights_only=True))
    assert (back.most, back.names, back.steps, back.epochs, back.marks) == (
        history.most,
        history.names,
        history.steps,
        history.epochs,
        history.marks,
    )
    assert torch.equal(back.values(), history.values())
    back.append(count, 0, NAMES, row(count))
    assert len(back) <= 20
    assert back.steps[-1] == count


def test_a_state_dict_does_not_change_with_the_history() -> None:
    history = filled(3)
    state = history.state_dict()
    history.append(9, 0, NAMES, row(9))
    history.mark(9, "a", "reset")
    assert state["steps"] == [0, 1, 2]
    assert state["marks"] == []
    assert state["values"].shape == (3, 2)


def grown(curve: list[float], every: int = 50) -> DriftHistory:
    history = DriftHistory()
    for index, value in enumerate(curve, 1):
        history.append(every * index, 0, NAMES, torch.tensor([value, 0.01], dtype=torch.float64))
    return history


def test_a_jump_is_found_at_the_last_sample_before_it() -> None:
    noise = [0.05, 0.08, 0.06, 0.07, 0.05, 0.06]
    assert grown([*noise, 3.0]).jumped_at("a") == 300
    assert grown([*noise * 3, 0.9, 2.0, 3.0]).jumped_at("a") == 900
    assert grown([*noise, 3.0]).jumped_at("b") is None


@pytest.mark.parametrize("power", [0.5, 1, 2, 4])
def test_drift_that_grows_as_in_fine_tuning_is_no_jump(power: float) -> None:
    curve = [(index / 100) ** power for index in range(1, 101)]
    assert all(grown(curve[:count]).jumped_at("a") is None for count in range(1, 101))


def test_a_level_that_stays_or_falls_is_no_jump() -> None:
    assert grown([0.5] * 20).jumped_at("a") is None
    assert grown([3.0, *[0.05] * 20]).jumped_at("a") is None
    assert grown([0.1] * 3 + [3.0]).jumped_at("a") is None, "too few samples before it"


def test_drift_that_is_not_a_number_is_no_jump() -> None:
    assert grown([0.05] * 10 + [float("nan")]).jumped_at("a") is None


@pytest.mark.parametrize(("between", "start"), [(0.25, 1050), (0.35, 1000)])
def test_a_jump_begins_where_a_fifth_of_it_is_done(between: float, start: int) -> None:
    assert grown([0.1] * 20 + [between, 1.1]).jumped_at("a") == start


@pytest.mark.parametrize(("now", "found"), [(0.95, False), (1.05, True)])
def test_a_jump_is_twice_as_far_as_ever_before(now: float, found: bool) -> None:
    # Once far away and back: the median does not tell.
    curve = [0.1] * 10 + [0.5] + [0.1] * 10 + [now]
    assert (grown(curve).jumped_at("a") is not None) is found


@pytest.mark.parametrize(("before", "found"), [(9, True), (8, False)])
def test_the_time_before_a_jump_is_four_times_as_long(before: int, found: bool) -> None:
    # Two samples long: from the first sample on `before` - 1 intervals are quiet.
    assert (grown([0.1] * before + [0.6, 1.1]).jumped_at("a") is not None) is found


def test_a_state_with_unknown_keys_or_without_known_ones_is_read() -> None:
    state = filled(3).state_dict()
    assert state["format"] == 1
    assert DriftHistory.from_state_dict({**state, "later": 1}).steps == [0, 1, 2]
    assert len(DriftHistory.from_state_dict({})) == 0
