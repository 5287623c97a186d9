"""The tables of batchnorm_state.md: ``python docs/behavior_table.py`` writes them into the page.

What a forward does is what :func:`lightning_bn.functional.describe` says of a layer in each state, which the tests
compare with torch. What becomes of the counter is read from one forward of it.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lightning_bn.functional import LayerBehavior, describe

PAGE = Path(__file__).parent / "batchnorm_state.md"
STATES = "mode", "built", "flag", "momentum"
VALUES: tuple[Sequence[object], ...] = (True, False), (True, False), (True, False), (0.1, None, 0)
WORDS: tuple[dict[object, str], ...]
WORDS = {True: "train", False: "eval"}, {True: "on", False: "off"}, {True: "on", False: "off"}, {}
MOVES = {"exponential": "move by 0.1", "cumulative": "average all batches equally", "none": "do not move"}


class Row(NamedTuple):
    """One line: the values of each attribute that it stands for, and what happens in all of these states."""

    state: tuple[tuple[object, ...], ...]
    outcome: tuple[str, ...]


def layer_in(training: object, built: object, flag: object, momentum: object) -> nn.BatchNorm1d:
    """A layer of two channels in one of the states."""
    layer = nn.BatchNorm1d(2, momentum=momentum, track_running_stats=bool(built)).train(bool(training))
    layer.track_running_stats = bool(flag)
    return layer


def outcome_of(layer: nn.BatchNorm1d) -> tuple[str, ...]:
    """What it normalizes with, how its statistics move, and what becomes of its counter."""
    [behavior] = describe(layer)
    return behavior.normalizes_with, moves(layer, behavior), counts(layer)


def moves(layer: nn.BatchNorm1d, behavior: LayerBehavior) -> str:
    """How the running statistics move, in words."""
    return "there are none" if layer.running_mean is None else MOVES[behavior.averaging]


def counts(layer: nn.BatchNorm1d) -> str:
    """What one forward adds to ``num_batches_tracked``."""
    if layer.num_batches_tracked is None:
        return "there is none"
    before = int(layer.num_batches_tracked)
    layer(torch.randn(4, 2))
    return f"+{int(layer.num_batches_tracked) - before}"


def rows() -> list[Row]:
    """All states, those that differ in one attribute alone and do the same in one line."""
    found = [Row(tuple((value,) for value in state), outcome_of(layer_in(*state))) for state in product(*VALUES)]
    for attribute in reversed(range(len(STATES))):
        found = merged(found, attribute)
    return found


def merged(found: Sequence[Row], attribute: int) -> list[Row]:
    """One line where an attribute makes no difference."""
    groups: dict[object, list[Row]] = {}
    for row in found:
        groups.setdefault((*row.state[:attribute], None, *row.state[attribute + 1 :], row.outcome), []).append(row)
    result = []
    for group in groups.values():
        values = tuple(value for row in group for value in row.state[attribute])
        if len(values) == len(VALUES[attribute]):
            state = group[0].state
            result.append(Row((*state[:attribute], values, *state[attribute + 1 :]), group[0].outcome))
        else:
            result.extend(group)
    return result


def behavior_table() -> str:
    """What a forward does, by the state of the layer."""
    heading = (*STATES, "normalizes with", "running statistics", "counter")
    lines = [[*map(cell, row.state, VALUES, WORDS), *row.outcome] for row in rows()]
    return markdown(heading, lines)


def cell(values: Sequence[object], all_of: Sequence[object], words: dict[object, str]) -> str:
    """The values of an attribute that a line stands for."""
    return "any" if len(values) == len(all_of) else ", ".join(words.get(value, str(value)) for value in values)


def affine_states() -> list[tuple[bool, bool, bool]]:
    """Each ``training``, ``affine`` and ``requires_grad``."""
    return [(training, *rest) for training in (True, False) for rest in ((True, True), (True, False), (False, False))]


def affine_layer(training: bool, affine: bool, requires_grad: bool) -> nn.BatchNorm1d:
    """A layer of two channels in one of these states."""
    layer = nn.BatchNorm1d(2, affine=affine).train(training)
    return layer.requires_grad_(requires_grad)


def affine_table() -> str:
    """What becomes of ``weight`` and ``bias``, and of the running statistics beside them."""
    lines = []
    for training, affine, requires_grad in affine_states():
        layer = affine_layer(training, affine, requires_grad)
        [behavior] = describe(layer)
        trains = "train" if behavior.affine_trainable else "do not train" if behavior.affine else "there are none"
        flag = str(requires_grad) if affine else "–"
        lines.append([WORDS[0][training], "on" if affine else "off", flag, trains, moves(layer, behavior)])
    return markdown(("mode", "affine", "requires grad", "weight, bias", "running statistics"), lines)


def markdown(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    rule = f"|{'---|' * len(heading)}\n"
    return "".join([row_of(heading), rule, *map(row_of, lines)])


def row_of(cells: Sequence[str]) -> str:
    """One line of it."""
    return f"| {' | '.join(cells)} |\n"


def in_page(text: str) -> str:
    """The page with its tables as they are now."""
    for name, table in {"behavior": behavior_table(), "affine": affine_table()}.items():
        begin, end = f"<!-- {name}: python docs/behavior_table.py -->\n\n", "\n<!-- end -->"
        before, _, rest = text.partition(begin)
        text = before + begin + table + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    PAGE.write_text(in_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
