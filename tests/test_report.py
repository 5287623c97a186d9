"""Tables that a stranger can read, on a narrow and on a wide terminal."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_bn.functional import (
    FreezeSchedule,
    SelectionError,
    TaskDrift,
    describe,
    freeze_batch_norm,
    plan,
    take_snapshot,
)
from lightning_bn.functional.layers.status import LayerStatus, status_by_name
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.report import behavior_table, drift_table, print_behavior, print_plan, sparkline, task_drift_table
from tests.models import SMALL_RESNET_NAMES, Holder, SmallResNet, fill_statistics, seeded


def network() -> nn.Module:
    """One of everything: frozen, in eval, cumulative, without statistics, with train and eval that disagree."""
    net = fill_statistics(seeded(SmallResNet))
    freeze_batch_norm(net, "layer1.0")
    net.layer2.eval()  # type: ignore[union-attr]
    net.bn1.track_running_stats = False  # type: ignore[union-attr]
    net.layer10[0].bn1.momentum = None  # type: ignore[index, union-attr]
    net.head.bn = nn.BatchNorm1d(4, affine=False, track_running_stats=False)  # type: ignore[union-attr]
    return Holder(net)


def printed(model: nn.Module, width: int, **selection: str) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        print_behavior(model, console=console, **selection)  # type: ignore[arg-type]
    return capture.get()


def rows_of(text: str) -> list[list[str]]:
    """The words of each line below the rule, up to the first empty one."""
    lines = text.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("───")) + 1
    return [line.split() for line in lines[begin : [*lines, ""].index("", begin)]]


@pytest.mark.parametrize("width", [80, 160])
def test_every_layer_is_one_line_that_says_what_it_does(width: int) -> None:
    rows = {row[0]: " ".join(row[1:]) for row in rows_of(printed(network(), width))}
    assert list(rows) == list(SMALL_RESNET_NAMES)
    assert rows["layer1.1.bn1"] == "4 train batch move by 0.1 7 train"
    assert rows["layer1.0.bn1"] == "4 eval running frozen 7 frozen"
    assert rows["layer2.0.bn1"] == "4 eval running do not move 7 train"
    assert rows["layer10.0.bn1"] == "4 train batch average all 7 train"
    assert rows["head.bn"] == "4 train batch none - none"


def test_the_kind_is_in_the_title_and_has_a_line_where_kinds_differ() -> None:
    text = printed(network(), 160)
    assert "BatchNorm1d: model.head; all others are BatchNorm2d.\n" in text
    text = printed(network(), 160, modules="layer2", root="model")
    assert text.startswith("2 BatchNorm2d layers, 0 in train mode: what the next forward does")
    assert text.count("BatchNorm") == 1


@pytest.mark.parametrize("width", [80, 160])
def test_what_surprises_is_said_in_a_sentence_with_the_layers_name(width: int) -> None:
    text = " ".join(printed(network(), width).split())
    assert "model.bn1: track_running_stats was switched off after construction" in text


@pytest.mark.parametrize("width", [80, 160])
def test_the_title_counts_layers_and_modes(width: int) -> None:
    text = " ".join(printed(network(), width).split())
    assert text.startswith(
        "10 BatchNorm layers, 6 in train mode: what the next forward does; all names begin with model."
    )


def test_only_selected_layers_are_printed() -> None:
    text = printed(network(), 160, modules="layer2", root="model")
    assert [row[0] for row in rows_of(text)] == ["bn1", "bn2"]
    assert "begin with model.layer2.0." in text
    assert "layer1" not in text
    assert text.split()[0] == "2"


def test_a_layer_that_is_the_model_itself_is_called_so() -> None:
    assert "(the model itself)" in printed(fill_statistics(nn.Sequential(nn.BatchNorm1d(3)))[0], 160)  # type: ignore[index]


def test_without_statuses_a_frozen_layer_is_one_that_does_not_move() -> None:
    net = network()
    with_status = behavior_table(describe(net), status_by_name(net))
    without = behavior_table(describe(net))
    console = Console(width=160)
    with console.capture() as capture:
        console.print(without)
    assert "frozen" not in capture.get()
    with console.capture() as capture:
        console.print(with_status)
    assert "frozen" in capture.get()


def test_large_numbers_are_grouped() -> None:
    net = fill_statistics(nn.Sequential(nn.BatchNorm1d(2048)))
    net[0].num_batches_tracked.fill_(1_234_567)  # type: ignore[index, union-attr, operator]
    text = printed(net, 160)
    assert "2,048" in text
    assert "1,234,567" in text


def test_a_model_without_batch_norm_is_an_error() -> None:
    with pytest.raises(SelectionError, match="no BatchNorm layer"):
        printed(nn.Linear(2, 2), 80)


# the plan


def planned(width: int, model: nn.Module, *patterns: Any, **arguments: Any) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        print_plan(plan(model, *patterns, **arguments), console=console)
    return capture.get()


def test_a_plan_shows_every_layer_its_rule_what_is_frozen_and_when() -> None:
    net = Holder(fill_statistics(seeded(SmallResNet)))
    by_task = {"det": ["head"], "seg": ["head", "layer10"]}
    text = planned(80, net, ["layer1"], root="model", by_task=by_task, schedule=FreezeSchedule(start_epoch=-20))
    rows = {row[0]: " ".join(row[1:]) for row in rows_of(text)}
    assert list(rows) == list(SMALL_RESNET_NAMES)
    assert rows["layer1.1.bn2"] == "layer1 statistics, affine all tasks"
    assert rows["head.bn"] == "head statistics, affine task det, seg"
    assert rows["layer10.0.bn1"] == "layer10 statistics, affine task seg"
    assert rows["layer2.0.bn1"] == "no rule nothing"
    flat = " ".join(text.split())
    assert "7 of 10 BatchNorm layers will be frozen from epoch -20; all names begin with model." in flat
    assert "10 other weights below the same paths still train" in flat


def test_a_plan_says_which_of_the_two_is_frozen() -> None:
    net = fill_statistics(seeded(SmallResNet))
    assert "affine" not in planned(160, net, "head", affine=False)
    assert "statistics" not in planned(160, net, "head", stats=False)


@pytest.mark.parametrize("pattern", ["**.bn[12]", "re:layer1[a-z0-9.]*", "layer1.*.bn[!2]"])
def test_a_pattern_is_shown_as_it_was_written(pattern: str) -> None:
    # Brackets are markup to rich.
    assert pattern in planned(160, fill_statistics(seeded(SmallResNet)), pattern)


def test_what_a_plan_has_no_column_for_stands_below_it() -> None:
    net = Holder(fill_statistics(seeded(SmallResNet)))
    pattern = "re:layer1[.][0-9][.]bn[12]"
    text = " ".join(planned(40, net, [pattern], root="model", by_task={"det": ["layer10", "head"]}).split())
    assert f"Selected by: {pattern} (4 layers), layer10 (2 layers), head (1 layer)." in text
    assert "Only in batches of a task: det: model.head, model.layer10." in text


# drift


def drifted(count: int = 3, *, bad: float | None = None) -> tuple[Any, ...]:
    """What a monitor has of ``count`` layers of which the k-th moved by k sigma, its variance by 1 + k."""
    names = [f"stage{index}" for index in range(count)]
    net = fill_statistics(nn.ModuleDict({name: nn.BatchNorm2d(4) for name in names})).train()
    reference = take_snapshot(net)
    history = DriftHistory()
    history.append(1, 0, tuple(names), torch.zeros(count, dtype=torch.float64))
    for index, layer in enumerate(net.children()):
        sigma = (layer.running_var + layer.eps).sqrt()  # type: ignore[union-attr, operator]
        layer.running_mean[0] += index * sigma[0]  # type: ignore[index, operator]
        layer.running_var.mul_(1 + index)  # type: ignore[union-attr, operator]
    if bad is not None:
        net[names[0]].running_mean[2] = bad  # type: ignore[index, operator]
    history.append(2, 0, tuple(names), torch.arange(count, dtype=torch.float64))
    return describe(net), reference, take_snapshot(net), history, [1.0] * count, "jeffreys", status_by_name(net)


def drift_text(width: int, *arguments: Any, **options: Any) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(drift_table(*arguments, **options))
    return capture.get()


def test_drift_is_shown_layer_by_layer_the_worst_first_in_plain_units() -> None:
    text = drift_text(160, *drifted())
    assert "Running statistics of 3 BatchNorm2d layers, the worst first (jeffreys)" in " ".join(text.split())
    assert rows_of(text) == [
        ["stage2", "batch", "running", "1", "+2.00", "x3.00", "3.3", "▁█"],
        ["stage1", "batch", "running", "1", "+1.00", "x2.00", "1", "▁█"],
        ["stage0", "batch", "running", "1", "+0.00", "x1.00", "0", "▁▁"],
    ]


def test_layers_that_are_not_measured_yet_say_so() -> None:
    rows = {row[0]: row[4:7] for row in rows_of(drift_text(160, *drifted(), warming_up=["stage1"]))}
    assert rows["stage1"] == ["-", "-", "not"]
    assert rows["stage2"] == ["+2.00", "x3.00", "3.3"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_layer_that_is_not_finite_is_the_worst(bad: float) -> None:
    assert rows_of(drift_text(160, *drifted(bad=bad)))[0][0] == "stage0"


def test_only_the_worst_are_shown_and_the_others_counted() -> None:
    text = drift_text(160, *drifted(14))
    assert [row[0] for row in rows_of(text)] == [f"stage{index}" for index in range(13, 3, -1)]
    assert "4 more" in text
    assert "more" not in drift_text(160, *drifted(10))


def frozen_by(statuses: dict[str, LayerStatus], *names: str, by: str = "BatchNormFreezer") -> dict[str, LayerStatus]:
    return {**statuses, **{name: LayerStatus(stats_frozen_by=(by,)) for name in names}}


def test_frozen_layers_that_did_not_move_are_one_line_together() -> None:
    *arguments, statuses = drifted(14)
    statuses = frozen_by(statuses, "stage0", "stage1")
    text = drift_text(160, *arguments, statuses)
    # The first one did not move, the second one did.
    assert "Frozen by BatchNormFreezer, did not move: stage0 (1 layer)\n" in text
    assert "... 3 more that moved less" in text
    assert "Running statistics of 14 BatchNorm2d layers" in text
    behaviors, reference, _, *others = arguments
    everybody = frozen_by(statuses, *(f"stage{index}" for index in range(14)))
    text = drift_text(160, behaviors, reference, reference, *others, everybody)
    assert "did not move: stage0, stage1, stage10, " in text
    assert "and 6 more paths (14 layers)" in text
    assert "history" not in text


@pytest.mark.parametrize("entry", ["running_mean", "running_var"])
def test_a_frozen_layer_that_moved_is_a_row_and_says_who_froze_it(entry: str) -> None:
    net = fill_statistics(nn.ModuleDict({name: nn.BatchNorm2d(4) for name in ("a", "b")}))
    reference = take_snapshot(net)
    getattr(net["a"], entry)[3] += 0.5
    text = drift_text(
        120,
        describe(net),
        reference,
        take_snapshot(net),
        DriftHistory(),
        [0.0, 0.0],
        "jeffreys",
        frozen_by({}, "a", "b"),
    )
    [row] = rows_of(text)
    assert (row[0], row[3]) == ("a", "BatchNormFreezer")
    assert "Frozen by BatchNormFreezer, did not move: b (1 layer)" in text


def test_what_to_do_stands_first() -> None:
    to_do = ["step 5: stage1 is fed by sources that alternate: give each statistics of its own.", "step 9: look."]
    lines = drift_text(60, *drifted(), to_do=to_do).splitlines()
    assert lines[0].startswith("Running statistics of 3")
    assert lines[3:7] == [
        "What to do:",
        "- step 5: stage1 is fed by sources that alternate: give each",
        "  statistics of its own.",
        "- step 9: look.",
    ]
    assert "What to do" not in drift_text(60, *drifted())


def test_tables_say_over_how_many_processes_a_layer_is_synchronized() -> None:
    behaviors, *others = drifted()
    behaviors = [replace(behaviors[0], processes=8), *behaviors[1:]]
    rows = {row[0]: row for row in rows_of(drift_text(160, behaviors, *others))}
    assert rows["stage0"][1:5] == ["batch", "of", "8", "processes"]
    assert rows["stage1"][1:3] == ["batch", "running"]
    console = Console(width=160)
    with console.capture() as capture:
        console.print(behavior_table(behaviors))
    assert capture.get().count("batch of 8 processes") == 1
    planned = plan(nn.ModuleDict({name: nn.BatchNorm2d(4) for name in ("a", "b")}), "a")
    synchronized = replace(planned, layers=(replace(planned.layers[0], processes=8), planned.layers[1]))
    with console.capture() as capture:
        print_plan(synchronized, console)
    assert "BatchNorm2d over 8 processes" in capture.get()


def test_a_frozen_layer_says_by_whom_and_an_unknown_rate_is_a_dash() -> None:
    behaviors, reference, current, history, _, measure, statuses = drifted()
    statuses = {**statuses, "stage1": LayerStatus(stats_frozen_by=("BatchNormFreezer",))}
    text = drift_text(160, behaviors, reference, current, history, [1.0, float("nan"), 0.5], measure, statuses)
    rows = {row[0]: row[1:] for row in rows_of(text)}
    assert rows["stage1"][:4] == ["running", "running", "BatchNormFreezer", "-"]
    assert rows["stage2"][2:4] == ["-", "0.5"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([0.0], "▁"),
        ([0.0, 0.0, 0.0], "▁▁▁"),
        ([3.0], "█"),
        ([0.0, 1.0, 2.0, 4.0], "▁▃▅█"),
        ([float("nan"), 1.0], "!█"),
        ([float("inf"), float("nan")], "!!"),
        ([-1.0, 1.0], "▁█"),
    ],
)
def test_a_sparkline_has_a_bar_a_value(values: list[float], line: str) -> None:
    assert sparkline(values) == line


@pytest.mark.parametrize("count", [12, 13, 100, 1000])
def test_a_sparkline_is_no_wider_than_asked_and_ends_with_the_newest(count: int) -> None:
    line = sparkline([0.0] * (count - 1) + [1.0])
    assert len(line) == 12
    assert line[-1] == "█"


def test_what_looks_like_batch_norm_and_is_not_torchs_is_named_below_the_table() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True))
    assert "Not listed, since they are not torch's BatchNorm: 1 (InstanceNorm1d)." in printed(net, 200)
    assert "Not listed" not in printed(net, 200, exclude="1")


# the drift between tasks


def between(
    values: dict[str, list[float]], tasks: tuple[str, ...] = ("detection", "segmentation", "depth")
) -> TaskDrift:
    """With these values of each layer for the pairs of tasks, in their order; the other direction is a half."""
    matrix = torch.zeros(len(tasks), len(tasks), len(values), dtype=torch.float64)
    rows, columns = torch.triu_indices(len(tasks), len(tasks), 1)
    matrix[rows, columns] = torch.tensor([*values.values()], dtype=torch.float64).T
    matrix[columns, rows] = matrix[rows, columns] / 2
    return TaskDrift(tasks, tuple(values), matrix)


THREE = {"stem.bn": [0.02, 1.5, 0.3], "body.0.bn": [0.01, 0.02, 0.03], "body.1.bn": [3.0, 0.2, 2.0]}


def between_text(drift: TaskDrift, width: int = 80, **options: Any) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(task_drift_table(drift, **options))
    return capture.get()


def test_the_drift_between_tasks_is_shown_for_each_two_the_furthest_layer_first() -> None:
    lines = [line.split() for line in between_text(between(THREE)).splitlines()]
    rows = [line for line in lines if line and line[0] in THREE]
    assert rows == [
        ["body.1.bn", "3", "0.2", "2", "per", "task"],
        ["stem.bn", "0.02", "1.5", "0.3", "per", "task"],
        ["body.0.bn", "0.01", "0.02", "0.03", "one"],
    ]
    heads = [line for line in lines if line and line[-1] in ("segmentation", "sets")]
    assert heads == [["detection", "detection", "segmentation"], ["layer", "segmentation", "depth", "depth", "sets"]]


def test_below_the_table_stands_what_to_give_and_that_the_others_need_none() -> None:
    text = " ".join(between_text(between(THREE)).split())
    assert "Layers that need a set for each task: modules: [stem, body.1]." in text
    assert "For other layers one set is enough: drift at most 0.03." in text
    text = " ".join(between_text(between(THREE), above=5.0).split())
    assert "One set is enough for all tasks: no layer's drift is above 5." in text
    assert "per task" not in text


def test_of_many_pairs_the_two_that_lie_furthest_apart_are_named() -> None:
    tasks = ("detection", "segmentation", "depth", "normals", "edges")
    values = {"a.bn": [0.0] * 9 + [0.7], "b.bn": [0.0, 0.9] + [0.0] * 8}
    rows = {
        line.split()[0]: line.split()[1:] for line in between_text(between(values, tasks)).splitlines() if ".bn" in line
    }
    assert rows["b.bn"] == ["detection,", "depth", "0.9", "per", "task"]
    assert rows["a.bn"] == ["normals,", "edges", "0.7", "per", "task"]


def test_a_layer_whose_tasks_are_not_comparable_comes_first() -> None:
    text = between_text(between({**THREE, "head.bn": [0.1, float("nan"), 0.1]}))
    rows = [line.split() for line in text.splitlines() if ".bn " in line]
    assert rows[0] == ["head.bn", "0.1", "nan", "0.1", "per", "task"]


@pytest.mark.parametrize("tasks", [2, 3, 4, 8])
def test_of_the_drift_between_tasks_every_pair_is_shown_or_the_furthest(tasks: int) -> None:
    names = ("detection", "segmentation", "depth", "normals", "edges", "keypoints", "saliency", "parts")[:tasks]
    pairs = tasks * (tasks - 1) // 2
    drift = between({f"layer.{index}": [1.0 + index] * pairs for index in range(14)}, names)
    text = between_text(drift)
    assert "... 4 more in which tasks lie closer" in text
    assert [row[0] for row in rows_of(text)] == [str(index) for index in range(13, 3, -1)]
    assert ("furthest apart" in text.split("──")[0].split("first")[1]) == (tasks > 3)
    assert "furthest apart  drift" not in between_text(drift, width=600)


def test_brackets_in_names_of_tasks_are_shown() -> None:
    assert "[b]" in between_text(between({"a.bn": [1.0]}, ("[b]", "c")))
