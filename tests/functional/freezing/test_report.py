"""The report of a freeze: in words, and as a state that other versions may have written."""

import io
import math
from typing import Any

import pytest
import torch

from lightning_bn.functional.freezing.change import Change
from lightning_bn.functional.freezing.report import FreezeReport, Violation, in_words

FULL = FreezeReport(
    layers=("a", "b"),
    steps=12,
    violations=(Violation(Change("a", "weight", 0.5, "LBFGS"), 3), Violation(Change("b", "bias", 2.0), 4)),
    task_layers=("c",),
    was_on=True,
    task_batches=5,
)


def test_a_state_says_its_format_and_is_read_with_weights_only() -> None:
    file = io.BytesIO()
    torch.save(FULL.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["format"] == 1
    assert FreezeReport.from_state_dict(state) == FULL


def test_unknown_keys_of_a_state_are_passed_over() -> None:
    state: dict[str, Any] = {**FULL.state_dict(), "format": 2, "color": "red"}
    state["violations"] = [{**one, "rank": 3} for one in state["violations"]]
    assert FreezeReport.from_state_dict(state) == FULL


@pytest.mark.parametrize("key", ["format", "layers", "steps", "violations", "task_layers", "was_on", "task_batches"])
def test_what_a_state_lacks_is_as_in_a_report_of_nothing(key: str) -> None:
    state = FULL.state_dict()
    del state[key]
    read = FreezeReport.from_state_dict(state)
    for name, value in vars(FULL).items():
        assert getattr(read, name) == (getattr(FreezeReport(), name) if name == key else value), name


@pytest.mark.parametrize("key", ["layer", "value", "largest_change", "cause", "step"])
def test_what_a_saved_violation_lacks_is_empty(key: str) -> None:
    state = FULL.state_dict()
    del state["violations"][0][key]
    violation, other = FreezeReport.from_state_dict(state).violations
    assert other == FULL.violations[1]
    read = {**vars(violation.change), "step": violation.step}
    expected = {"layer": "a", "value": "weight", "largest_change": 0.5, "cause": "LBFGS", "step": 3}
    empty = {"layer": "", "value": "", "cause": "", "step": 0}
    assert math.isnan(read["largest_change"]) if key == "largest_change" else read[key] == empty[key]
    assert {k: v for k, v in read.items() if k != key} == {k: v for k, v in expected.items() if k != key}


def test_an_empty_state_is_a_report_of_nothing() -> None:
    assert FreezeReport.from_state_dict({}) == FreezeReport()


def test_of_many_layers_the_first_three_are_said_and_the_rest_is_counted() -> None:
    assert in_words([Violation(Change(name, "bias", 1.0), 2) for name in "abcde"]) == (
        "step 2: a (bias by up to 1); step 2: b (bias by up to 1); step 2: c (bias by up to 1); 2 more layers"
    )
