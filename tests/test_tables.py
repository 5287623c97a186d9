"""Every table of the package, at the widths that consoles have and with the names that networks have."""

import io
import re
import time

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_bn._names import shortened, wrapped
from lightning_bn._tables import Column, LayerTable
from lightning_bn.functional import FreezeSchedule, TaskDrift, describe, plan, take_snapshot
from lightning_bn.functional.layers.status import LayerStatus, status_by_name
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.report import behavior_table, drift_table, plan_table, task_drift_table
from tests.models import fill_statistics

WIDTHS = (60, 80, 100, 120)
STEMS = {
    10: ("b", "nets.", ".bn"),
    30: ("backbone_2d.blocks", "model.", ".bn"),
    60: ("backbone_2d.residual_stage.deformable_convolution", "model.", ".bn"),
}
"""Of names of about this length: what differs comes in the middle or at the end, as kinds and heads make it."""
KINDS = ("behavior", "drift", "plan", "tasks")


def names_of(length: int, where: str) -> list[str]:
    stem, before, after = STEMS[length]
    if where == "last":
        return [f"{before}{stem}.{index}{after}" for index in range(4)]
    return [f"{before}s{index}.{stem}{after}" for index in range(3)] + [f"{before}head{after}"]


def network(names: list[str]) -> nn.Module:
    root = nn.ModuleDict()
    for index, name in enumerate(names):
        *parts, last = name.split(".")
        at = root
        for part in parts:
            if part not in at:
                at[part] = nn.ModuleDict()
            at = at[part]  # type: ignore[assignment]
        at[last] = nn.BatchNorm2d(4) if index else nn.BatchNorm1d(4)
    net = fill_statistics(root).train()
    net.get_submodule(names[1]).track_running_stats = False
    return net


def table(kind: str, names: list[str]) -> LayerTable:
    net = network(names)
    if kind == "behavior":
        return behavior_table(describe(net), status_by_name(net), {"other.norm": nn.InstanceNorm1d(3)})
    if kind == "plan":
        schedule = FreezeSchedule(start_epoch=3)
        return plan_table(plan(net, names[0], by_task={"detection": [names[1]]}, schedule=schedule))
    if kind == "tasks":
        values = torch.rand(4, 4, len(names), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return task_drift_table(TaskDrift(("detection", "segmentation", "depth", "edges"), tuple(names), values))
    reference, history = take_snapshot(net), DriftHistory()
    for step, name in enumerate(names):
        net.get_submodule(name).running_mean.add_(1.0 + step)  # type: ignore[union-attr, operator]
        history.append(step, 0, tuple(names), torch.rand(len(names), dtype=torch.float64))
    statuses = {names[0]: LayerStatus(stats_frozen_by=("BatchNormFreezer",))}
    to_do = [f"step 5: {names[1]} is fed by sources that alternate: give each statistics of its own."]
    return drift_table(
        describe(net), reference, take_snapshot(net), history, [1.0] * 4, "jeffreys", statuses, to_do=to_do
    )


def printed(table: LayerTable, width: int, encoding: str = "utf-8") -> str:
    written = io.BytesIO()
    console = Console(width=width, file=io.TextIOWrapper(written, encoding=encoding))
    console.print(table)
    console.file.flush()
    return written.getvalue().decode(encoding)


def shown_in(table: LayerTable, width: int) -> LayerTable:
    """The table itself, or the one that is printed in its place."""
    other = table.otherwise
    words = {word for column in table.columns for word in column.heading.split()}
    return table if other is None or words <= set(printed(table, width).split()) else other


@pytest.mark.parametrize("where", ["last", "middle"])
@pytest.mark.parametrize("length", STEMS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_word_of_every_cell_is_there_in_one_line_a_layer(kind: str, width: int, length: int, where: str) -> None:
    names = names_of(length, where)
    made = table(kind, names)
    text = printed(made, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    made = shown_in(made, width)
    rule = next(index for index, line in enumerate(lines) if line.startswith("───"))
    above, rows, below = lines[:rule], lines[rule + 1 : rule + 1 + len(made.rows)], lines[rule + 1 + len(made.rows) :]
    assert not below or below[0] == ""
    said = "".join("".join(below).split())
    gone = []
    for index, column in enumerate(made.columns):
        cells = [re.escape(row.cells[index]) for row in made.rows]
        there = all(re.search(rf"(?:^|\s){cell}(?:\s|$)", one) for cell, one in zip(cells, rows, strict=True))
        if there and set(column.heading.split()) <= set(" ".join(above[-4:]).split()):
            continue
        gone.append(column)
        assert "".join((column.instead or column.heading).split()) in said
    assert len(gone) < len(made.columns)
    if gone:
        # The least important ones.
        assert min(column.rank for column in gone) >= max(one.rank for one in made.columns if one not in gone)
    first = [line.split()[0] for line in rows]
    assert len(set(first)) == len(names)
    for name, shown in zip((row.name for row in made.rows), first, strict=True):
        # Whole components.
        head, _, tail = shown.rpartition("…")
        assert name.endswith(tail if not head and "…" not in shown else f".{tail}")
        assert not head or f".{head}" in f".{name}"
    for sentence in (*made.above, *made.below, made.title):
        assert sentence.replace(" ", "") in text.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "length"), [(100, 10), (120, 30)])
def test_where_there_is_room_no_column_is_left_out(kind: str, width: int, length: int) -> None:
    made = table(kind, names_of(length, "last"))
    assert shown_in(made, width) is made or kind == "tasks"
    assert "Left out" not in printed(made, width)


@pytest.mark.parametrize("width", range(1, 60))
def test_no_console_is_too_narrow(width: int) -> None:
    for kind in KINDS:
        assert max(map(len, printed(table(kind, names_of(30, "middle")), width).splitlines())) <= width


def test_a_table_is_laid_out_anew_for_each_console() -> None:
    made = table("drift", names_of(60, "last"))
    assert "Left out below" in printed(made, 60)
    assert "Left out below" not in printed(made, 160)
    assert printed(made, 60) == printed(made, 60)


def test_a_narrow_table_says_from_which_width_on_all_of_it_is_shown() -> None:
    made = table("behavior", names_of(30, "last"))
    [needed] = map(int, re.findall(r"Left out below (\d+) columns", printed(made, 60)))
    assert "Left out" in printed(made, needed - 1)
    assert "Left out" not in printed(made, needed)


def test_what_is_the_same_in_all_layers_is_said_where_its_column_is_left_out() -> None:
    made = LayerTable("title", [Column("one two", 1), Column("three", 2), Column("four", 3)])
    for name in ("model.a", "model.b"):
        made.add_row(name, "x" * 20, "y" * 20, name)
    assert "Left out below 58 columns: three (yyyyyyyyyyyyyyyyyyyy in all); four." in " ".join(
        printed(made, 40).split()
    )


def test_a_console_without_the_characters_gets_others() -> None:
    text = printed(table("behavior", names_of(60, "last")), 60, encoding="ascii")
    text += printed(table("behavior", names_of(60, "middle")), 60, encoding="ascii")
    assert text.isascii()
    assert "s0...." in text


def test_brackets_and_colons_are_no_markup() -> None:
    made = LayerTable("[bold]title", [Column("[red]", 1)], below=["[/red] :smile:"])
    made.add_row("model.[a]", ":smile: [b]")
    text = printed(made, 60)
    assert [line for line in text.splitlines() if line] == [
        "[bold]title",
        "layer      [red]",
        "─" * len("model.[a]  :smile: [b]"),
        "model.[a]  :smile: [b]",
        "[/red] :smile:",
    ]


def test_a_table_can_be_put_into_others_of_rich() -> None:
    from rich.panel import Panel

    console = Console(width=70)
    with console.capture() as capture:
        console.print(Panel(table("behavior", names_of(30, "last"))))
    assert max(map(len, capture.get().splitlines())) <= 70
    assert "normalizes" in capture.get()


@pytest.mark.parametrize("width", range(3, 40))
def test_names_stay_apart_as_long_as_they_can(width: int) -> None:
    names = ["stage1.blocks.0.bn", "stage2.blocks.0.bn", "stage1.blocks.1.bn", "stem.normalization_of_input"]
    short = shortened(names, width)
    assert max(map(len, short)) <= width
    if width >= len("stage1.…0.bn"):
        assert len(set(short)) == 4
    if width >= len("…normalization_of_input"):
        assert short[3] in (names[3], "…normalization_of_input")


def test_a_word_without_a_place_to_break_is_folded_and_loses_nothing() -> None:
    assert wrapped("a " + "x" * 25 + " b", 10) == ["a", "x" * 10, "x" * 10, "xxxxx b"]
    assert wrapped("", 10) == [""]


@pytest.mark.parametrize("name", ["a" * 160, "a" * 20_000, "a_" * 10_000, "a." * 10_000])
def test_long_names_take_no_time(name: str) -> None:
    made = LayerTable("title", [Column("one", 1), Column("two", 2), Column("x" * 70, 3)])
    for index in range(20):
        made.add_row(f"{index}{name}{index}", "a", "b", "c")
    began = time.process_time()
    text = printed(made, 80)
    assert time.process_time() - began < 5  # 20 s and more, where every width was tried on the whole of a name
    assert max(map(len, text.splitlines())) <= 80
