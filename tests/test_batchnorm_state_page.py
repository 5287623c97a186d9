"""The page on BatchNorm's state: its tables are those that torch obeys, and its numbers are those that are printed."""

import copy
import os
import re
import runpy
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_bn.functional import freeze_batch_norm
from tests.functional.layers.test_behavior import batch_of, build, observed
from tests.models import warmed
from tests.pages import blocks

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "batchnorm_state.md"
TEXT = PAGE.read_text(encoding="utf-8")
TABLES = runpy.run_path(str(DOCS / "behavior_table.py"))
ROWS = TABLES["rows"]()
CLAIMS = TEXT.split("## Common errors")[1]
[RANKS] = [block for block in blocks(TEXT) if block.reason == "needs two processes"]


def table(heading):
    """The cells of the table that has this first heading, without marks of Markdown."""
    body = TEXT.split(f"| {heading} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("**", "") for cell in line.strip("|").split(" | ")] for line in body]


def test_the_tables_are_those_that_are_generated():
    assert TABLES["in_page"](TEXT) == TEXT


def test_a_table_that_was_changed_by_hand_is_seen():
    changed = TEXT.replace("| batch | move by 0.1 | +1 |", "| batch | do not move | +1 |")
    assert changed != TEXT == TABLES["in_page"](changed)


def test_each_state_is_in_one_row():
    states = [state for row in ROWS for state in product(*row.state)]
    assert len(states) == len(set(states)) == len(list(product(*TABLES["VALUES"]))) == 24


WORDS = {
    "move by 0.1": (True, "exponential"),
    "average all batches equally": (True, "cumulative"),
    "do not move": (False, "none"),
    "there are none": (False, "none"),
}


@pytest.mark.parametrize(
    ("state", "outcome"), [(state, row.outcome) for row in ROWS for state in product(*row.state)], ids=str
)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_torch_does_what_the_row_says(dim, state, outcome):
    training, built, flag, momentum = state
    layer = build(dim, training=training, buffers=built, flipped=built != flag, momentum=momentum)
    counted = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
    seen = observed(layer, batch_of(dim))
    normalizes_with, moves, counter = outcome
    updates, averaging = WORDS[moves]
    assert seen == {"normalizes_with": normalizes_with, "updates_running": updates, "averaging": averaging}
    assert (moves == "there are none") is (layer.running_mean is None)
    assert counter == ("there is none" if counted is None else f"+{int(layer.num_batches_tracked) - counted}")


@pytest.mark.parametrize("line", table("mode | affine"), ids=str)
def test_weight_and_bias_do_what_the_row_says(line):
    training, affine, requires_grad, parameters, moves = line
    layer = build(2, training=training == "train", affine=affine == "on", momentum=0.1)
    layer.requires_grad_(requires_grad == "True")
    x, before = batch_of(2).requires_grad_(), layer.running_mean.clone()
    layer(x).square().sum().backward()
    trains = {"train": True, "do not train": False, "there are none": None}[parameters]
    assert trains == (None if layer.weight is None else layer.weight.grad is not None)
    assert (moves == "move by 0.1") is not torch.equal(before, layer.running_mean)


@pytest.mark.parametrize("training", [True, False])
def test_buffers_set_to_none_are_as_those_never_built(training):
    later, never = build(2, training=training), build(2, training=training, buffers=False)
    never.load_state_dict(later.state_dict(), strict=False)
    later.running_mean = later.running_var = None
    assert torch.equal(later(batch_of(2)), never(batch_of(2)))


def test_each_claim_has_a_block_of_its_own():
    parts = CLAIMS.split("\n### ")[1:]
    assert len(parts) >= 12
    assert all(part.count("```python") == 1 and part.count("```text") == 1 for part in parts)


def test_results_by_hand_are_those_that_are_printed():
    by_hand = re.findall(r"\| ([\d.]+) \|$", TEXT.split("## The formula by hand")[1].split("```")[0], re.M)
    printed = re.findall(r"\d+\.\d{4}", blocks(TEXT)[0].printed)
    assert by_hand == printed
    assert len(printed) == 4


def test_updates_until_one_percent_is_left():
    said = re.search(r"takes (\d+) updates until 1 % .* with 0\.01 it takes (\d+)", TEXT.replace("\n", " "))
    for updates, momentum in zip(map(int, said.groups()), (0.1, 0.01), strict=True):
        assert (1 - momentum) ** updates <= 0.01 < (1 - momentum) ** (updates - 1)


SWITCHES = {
    "`.train()`": lambda layer: layer.train(),
    "`.eval()`": lambda layer: layer.eval(),
    "`requires_grad_(False)`": lambda layer: layer.requires_grad_(False),
    "`track_running_stats = False` later": lambda layer: setattr(layer, "track_running_stats", False),
    "`momentum = 0` later": lambda layer: setattr(layer, "momentum", 0),
    "`affine = False` later": lambda layer: setattr(layer, "affine", False),
    "`freeze_batch_norm(model)`": freeze_batch_norm,
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_does_what_its_row_says(name):
    [(_, normalizes, statistics, affine)] = [line for line in table("switch") if line[0] == name]
    layer = build(2)
    unchanged = copy.deepcopy(layer)
    SWITCHES[name](layer)
    same_function = torch.equal(copy.deepcopy(layer)(batch_of(2)), unchanged(batch_of(2)))
    before, counter = layer.running_mean.clone(), int(layer.num_batches_tracked)
    layer(batch_of(2).requires_grad_()).square().sum().backward()
    with_batch = normalizes in ("the batch", "unchanged") or normalizes.startswith("training: the batch")
    assert same_function is with_batch
    assert torch.equal(layer.running_mean, before) is statistics.startswith("stay")
    assert (layer.weight.grad is not None) is (affine != "do not train")
    assert (int(layer.num_batches_tracked) > counter) is (name == "`momentum = 0` later" or "stay" not in statistics)


@pytest.mark.parametrize(("name", "weight"), [("reset_running_stats", 2.0), ("reset_parameters", 1.0)])
def test_what_is_reset_is_what_the_row_says(name, weight):
    [(_, _, statistics, affine)] = [line for line in table("switch") if line[0] == f"`{name}()`"]
    layer = build(2)
    layer.weight.data.fill_(2.0)
    getattr(layer, name)()
    assert statistics == "mean 0, variance 1, counter 0"
    assert not layer.running_mean.any()
    assert (layer.running_var == 1).all()
    assert int(layer.num_batches_tracked) == 0
    assert (layer.weight == weight).all()
    assert affine == ("unchanged" if weight == 2 else "weight 1, bias 0")


def test_every_switch_of_the_table_is_tested():
    reset, built = {"`reset_running_stats()`", "`reset_parameters()`"}, {"`track_running_stats=False` when built"}
    assert {line[0] for line in table("switch")} == set(SWITCHES) | reset | built


def test_all_tensors_are_saved_moved_and_loaded():
    layer, names = (
        warmed(nn.Sequential(nn.BatchNorm2d(3))),
        {"0.running_mean", "0.running_var", "0.num_batches_tracked"},
    )
    assert set(layer.state_dict()) - {name for name, _ in layer.named_parameters()} == names
    other = nn.Sequential(nn.BatchNorm2d(3)).eval()
    other.load_state_dict(layer.train().state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in layer.state_dict().items())
    assert not other[0].training
    assert {str(value.device) for value in other.to("meta").state_dict().values()} == {"meta"}


def means_of_rank_1(code, folder):
    """What the block for two processes prints, in two processes."""
    (folder / "ranks.py").write_text(code)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "ranks.py"],
            cwd=folder,
            env={**meeting, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return "".join(process.communicate(timeout=60)[0] for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_two_processes_print_what_the_page_says(tmp_path):
    assert means_of_rank_1(RANKS.code, tmp_path) == RANKS.printed


def test_nothing_is_sent_without_broadcast_buffers(tmp_path):
    code = RANKS.code.replace("momentum=1.0))", "momentum=1.0), broadcast_buffers=False)")
    assert code != RANKS.code
    means = re.findall(r"\d+\.\d", means_of_rank_1(code, tmp_path))
    assert means == ["0.0"] + ["11.0"] * 8


@pytest.mark.parametrize(("training", "buffers"), [(True, True), (True, False), (False, False)])
def test_one_value_per_channel_is_an_error_wherever_the_batch_normalizes(training, buffers):
    assert "A layer that normalizes with the batch needs more than one value per channel" in TEXT
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        build(1, training=training, buffers=buffers)(batch_of(1, batch=1))
    build(1, training=False)(batch_of(1, batch=1))
