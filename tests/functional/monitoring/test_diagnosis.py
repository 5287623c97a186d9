"""Evidence and the one sentence that names the kind, the layer and the remedy."""

from typing import Any

import pytest
import torch

from lightning_bn.functional.monitoring.diagnosis import ALTERNATING, FEWEST_BATCHES, LAGGING, RANKS_DIFFER, diagnose
from lightning_bn.functional.monitoring.measure import Evidence, LayerTable

NAMES = ("stem.bn", "body.bn", "head.bn")


def evidence(**changed: Any) -> Evidence:
    """Of three healthy layers, but for what is given."""
    measured: dict[str, Any] = {
        "nonfinite": [0.0] * 3,
        "nonfinite_anywhere": [0.0] * 3,
        "collapsed": [0.0] * 3,
        "newly_collapsed": [0.0] * 3,
        "explosion": [1.0] * 3,
        "updates": [1.0] * 3,
        "changed": [1.0] * 3,
        "bias": [0.1] * 3,
        "scatter": [0.1] * 3,
        "apart": [0.0] * 3,
        "gap": [0.0] * 3,
        "reset": [0.0] * 3,
        "summary": [0.0] * 7,
        "largest": [0.0] * 3,
        "largest_anywhere": [0.0] * 3,
        "initial_share": [0.0] * 3,
    }
    known: dict[str, Any] = {
        "frozen_by": ((),) * 3,
        "dtypes": ("torch.float32",) * 3,
        "training": [True] * 3,
        "synchronized": [False] * 3,
        "idle": [0] * 3,
        "samples": 32,
        "judged": FEWEST_BATCHES,
        "processes": 1,
    }
    columns = {name: torch.tensor(changed.pop(name, column), dtype=torch.float64) for name, column in measured.items()}
    known = {**known, **changed}
    of_layers = {name: torch.tensor(known.pop(name)) for name in ("training", "synchronized", "idle")}
    return Evidence(LayerTable(**columns), NAMES, **of_layers, **known)


def found(**changed: Any) -> list[tuple[str, str]]:
    return [(one.layer, one.kind) for one in diagnose(evidence(**changed))]


def test_a_healthy_model_has_nothing() -> None:
    assert diagnose(evidence()) == []


@pytest.mark.parametrize(
    ("changed", "layer", "kind", "words"),
    [
        (
            {"nonfinite_anywhere": [0, 2, 0], "nonfinite": [0, 2, 0]},
            "body.bn",
            "not finite",
            ["2 channels", "finite, and a"],
        ),
        ({"nonfinite_anywhere": [0, 1, 0]}, "body.bn", "not finite", ["1 channel whose", "not finite on another rank"]),
        (
            {"newly_collapsed": [0, 2, 1]},
            "body.bn",
            "collapsed",
            ["(and 1 more layer)", "2 channels whose variance fell below eps"],
        ),
        (
            {"scatter": [0.1, 0.5, 0.6], "samples": 2, "processes": 4, "synchronized": [False, False, True]},
            "body.bn",
            "small batches",
            ["body.bn normalizes the 2 samples of each rank", "vary by 0.5 sigma", "normalizes 8 samples together"],
        ),
        ({"explosion": [2, 101, 99]}, "body.bn", "exploding", ["variances 101 times those", "0 to 255"]),
        ({"scatter": [0.1, 1.5, 0.1], "bias": [0.1, 1.4, 0.1]}, "body.bn", "lagging", ["lags 1.4 sigma"]),
        (
            {"updates": [1, 0, 1], "idle": [0, 20, 0], "changed": [True, False, True]},
            "body.bn",
            "stalled",
            ["not updated in 20 batches", "no forward reaches it"],
        ),
        ({"updates": [1, 1, 2]}, "head.bn", "updated twice", ["2 times per batch", "more than once in a forward"]),
        (
            {"frozen_by": [(), ("BatchNormFreezer",), ()]},
            "body.bn",
            "frozen but moves",
            ["frozen by BatchNormFreezer", "train mode"],
        ),
        (
            {"frozen_by": [(), ("me",), ()], "updates": [1, 0, 1]},
            "body.bn",
            "frozen but moves",
            ["frozen by me", "written to"],
        ),
        ({"bias": [0.1, 2.0, 0.1]}, "body.bn", "lagging", ["lags 2.0 sigma", "PreciseBatchNorm", "learning rate"]),
        (
            {"scatter": [0.1, 3.0, 0.1]},
            "body.bn",
            "alternating",
            ["sources that alternate", "3.0 sigma", "statistics of its own", "TaskBatchNorm(modules=['body'])"],
        ),
        (
            {"scatter": [3.0, 0.1, 3.0], "others": ("stem.other",)},
            "stem.bn",
            "alternating",
            ["(and 1 more layer)", "TaskBatchNorm(modules=['head', 'stem.bn'])"],
        ),
        (
            {"scatter": [0.1, 3.0, 0.1], "task": "seg"},
            "body.bn",
            "alternating",
            ["body.bn with the statistics of task 'seg' gets its batches from"],
        ),
        (
            {"gap": [0.0, 2.0, 0.0]},
            "body.bn",
            "ranks differ",
            ["2.0 sigma", "the moving average of rank 0", "SyncBatchNorm"],
        ),
    ],
)
def test_each_kind_is_named_in_one_sentence_that_starts_with_the_layer(
    changed: dict[str, Any], layer: str, kind: str, words: list[str]
) -> None:
    [one] = diagnose(evidence(**changed))
    assert (one.layer, one.kind) == (layer, kind)
    assert one.sentence.startswith(layer)
    assert one.sentence.endswith(".")
    for word in words:
        assert word in one.sentence


@pytest.mark.parametrize(
    ("row", "kind"), [("nonfinite_anywhere", "not finite"), ("bias", "lagging"), ("scatter", "alternating")]
)
def test_one_cause_in_many_layers_is_one_line_with_the_first_of_them(row: str, kind: str) -> None:
    [one] = diagnose(evidence(**{row: [0.0, 5.0, 5.0]}))
    assert (one.layer, one.kind) == ("body.bn", kind)
    assert "(and 1 more layer)" in one.sentence


@pytest.mark.parametrize(("samples", "processes", "found_some"), [(4, 2, True), (5, 2, False), (4, 1, False)])
def test_only_small_batches_of_several_ranks_are_called_small(samples: int, processes: int, found_some: bool) -> None:
    assert bool(found(scatter=[0.5] * 3, samples=samples, processes=processes)) is found_some


def test_what_was_said_of_one_task_was_not_said_of_another() -> None:
    twice = evidence(updates=[2.0, 1.0, 1.0], task="seg")
    assert diagnose(twice, {("stem.bn", "updated twice"), ("stem.bn", "updated twice", "det")})
    assert diagnose(twice, {("stem.bn", "updated twice", "seg")}) == []


def test_a_layer_fed_by_alternating_sources_is_not_also_called_lagging() -> None:
    assert found(scatter=[3.0, 0.1, 0.1], bias=[1.4, 0.1, 0.1]) == [("stem.bn", "alternating")]


def test_nothing_is_said_of_batches_before_enough_of_them_were_judged() -> None:
    changed = {"bias": [9.0] * 3, "scatter": [9.0] * 3, "gap": [9.0] * 3}
    assert found(**changed, judged=FEWEST_BATCHES - 1) == []
    assert found(**changed, judged=FEWEST_BATCHES)


def test_a_layer_is_not_called_stalled_before_enough_batches_passed_it_by() -> None:
    assert found(updates=[1, 0, 1], idle=[0, FEWEST_BATCHES - 1, 0]) == []
    assert found(updates=[1, 0, 1], idle=[0, FEWEST_BATCHES, 0]) == [("body.bn", "stalled")]


def test_a_layer_in_eval_and_a_frozen_one_that_stands_still_are_no_faults() -> None:
    still = {"updates": [1, 0, 1], "idle": [0, 50, 0], "changed": [True, False, True]}
    assert found(**still, training=[True, False, True]) == []
    assert found(**still, frozen_by=[(), ("me",), ()], training=[True, False, True]) == []


def test_what_is_not_known_of_updates_is_no_fault() -> None:
    assert found(updates=[float("nan")] * 3) == []


def test_small_batches_are_given_what_they_differ_by_by_chance() -> None:
    scatter = [ALTERNATING + 0.3, 0.1, 0.1]
    assert found(scatter=scatter, samples=4) == []
    assert found(scatter=scatter, samples=256) == [("stem.bn", "alternating")]


def test_the_thresholds_are_where_they_are_said_to_be() -> None:
    many = 10**8
    assert found(bias=[LAGGING * 0.99] * 3) == []
    assert found(bias=[LAGGING * 1.01] * 3) == [("stem.bn", "lagging")]
    assert found(scatter=[ALTERNATING * 0.99] * 3, samples=many) == []
    assert found(scatter=[ALTERNATING * 1.01] * 3, samples=many) == [("stem.bn", "alternating")]
    assert found(gap=[RANKS_DIFFER * 0.99] * 3, samples=many) == []
    assert found(gap=[RANKS_DIFFER * 1.01] * 3, samples=many) == [("stem.bn", "ranks differ")]


def test_a_batch_of_unknown_size_is_judged_as_the_smallest() -> None:
    assert found(scatter=[ALTERNATING + 1.9, 0.1, 0.1], samples=None) == []
    assert found(scatter=[ALTERNATING + 2.1, 0.1, 0.1], samples=None) == [("stem.bn", "alternating")]


def test_values_that_are_not_a_number_are_no_faults_of_batches() -> None:
    nan = [float("nan")] * 3
    assert found(bias=nan, scatter=nan, gap=nan) == []


def test_uses_that_lie_apart_are_one_finding_that_names_the_furthest_and_says_why() -> None:
    changed = {"updates": [2.0, 1.0, 2.0], "apart": [0.5, 0.0, 4.0]}
    [one] = diagnose(evidence(**changed))
    assert (one.layer, one.kind) == (NAMES[2], "shared")
    assert set(one.layers) == {NAMES[0], NAMES[2]}
    assert (
        f"{NAMES[2]} (and 1 more layer) is used 2 times per step with inputs whose means lie 4.0 sigma apart"
        in one.sentence
    )
    assert "task_statistics" in one.sentence
    assert diagnose(evidence(**changed), {(name, "updated twice") for name in NAMES}) == []


def test_uses_that_agree_keep_the_sentence_and_are_told_how_not_to_count_one() -> None:
    [one] = diagnose(evidence(updates=[2.0, 1.0, 1.0], apart=[0.5, 0.0, 0.0]))
    assert one.kind == "updated twice"
    assert "used more than once in a forward" in one.sentence
    assert "without_updates" in one.sentence


def test_overflow_of_half_precision_is_named_where_statistics_are_not_finite() -> None:
    columns = {"nonfinite": [1.0, 0.0, 0.0], "nonfinite_anywhere": [1.0, 0.0, 0.0]}
    [half] = diagnose(evidence(**columns, dtypes=("torch.float16",) * 3))
    assert "a variance above 65,504, where float16 ends" in half.sentence
    [single] = diagnose(evidence(**columns))
    assert "65,504" not in single.sentence
