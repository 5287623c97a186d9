"""What `lightning-bn inspect` prints, its page and its figure."""

import json
import re
import sys

import pytest
import torch
from torch import nn

from tests.cli.planting import fill

NAN = float("nan")


@pytest.mark.parametrize("width", [60, 80, 100])
def test_nothing_is_wider_than_the_console_and_no_name_is_broken(width, state, save, command, monkeypatch):
    fill(state, "bn1", mean={2: NAN})
    long = {f"network.backbone.encoder.stages.{name}": value for name, value in state.items()}
    monkeypatch.setenv("COLUMNS", str(width))
    _, said = command("inspect", save({"state_dict": long, "ema": state}).name, "--all")
    lines = said.splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.split()[:1] == ["layer1.0.bn1"] for line in lines) == 2


def test_the_mean_is_shown_on_80_columns_beside_names_of_20_characters(state, save, command):
    fill(state, "layer1.0.bn1", 0.0, 1.0)
    state["layer1.0.bn1.num_batches_tracked"].fill_(0)
    long = {f"encoder.{name}": value for name, value in state.items()}
    long |= {f"decoder{name}": value for name, value in state.items()}
    _, said = command("inspect", save(long).name)
    heading = next(line for line in said.splitlines() if line.startswith("layer "))
    assert {"mean", "variance", "found"} <= set(heading.split())
    assert re.search(r"^encoder.layer1.0.bn1 +0 +0 +1 +never updated", said, re.M)


def test_columns_that_say_nothing_are_not_there(trained, save, command):
    _, said = command("inspect", save(trained).name)
    assert "weights" not in said.partition("What")[0].replace("the weights", "")
    for name in trained:
        if name.endswith("tracked"):
            trained = {**trained, name: trained[name] * 0}
    _, said = command("inspect", save(trained).name)
    assert "initial values left" not in " ".join(said.split())
    assert "Left out" not in said


def test_what_there_is_one_of_is_told_in_the_singular(save, command):
    layer = nn.BatchNorm1d(1)
    layer(torch.randn(8, 1))
    layer.running_var.fill_(-1.0)
    layer.register_buffer("one", torch.zeros(1))
    _, said = command("inspect", save({"state_dict": layer.state_dict(), "ema": layer.state_dict()}).name)
    assert not re.search(r"\b1 (channels|updates|layers|times)\b", " ".join(said.split())), said


def test_the_first_twenty_layers_are_listed_and_all_if_asked(save, command):
    state = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(30))).state_dict()
    state["25.running_var"].fill_(NAN)
    path = save(state)
    _, said = command("inspect", path)
    rows = re.findall(r"^(\d+) +\d", said, re.M)
    assert len(rows) == 20
    assert "... 10 more; --all lists them." in said
    assert len(re.findall(r"^(\d+) +\d", command("inspect", path, "--all")[1], re.M)) == 30


def test_layers_at_fault_are_listed_first(state, save, command):
    fill(state, "head.bn", mean={0: NAN})
    _, said = command("inspect", save(state))
    rows = [line.split()[0] for line in said.splitlines() if re.match(r"[\w.]*bn\d? ", line)]
    assert rows[0] == "head.bn"
    assert len(rows) == 10


def test_a_page_needs_nothing_beside_it_and_executes_nothing(state, save, command, tmp_path):
    fill(state, "bn1", mean={2: NAN})
    state = {name.replace("head", "<script>alert(1)</script>"): value for name, value in state.items()}
    code, _ = command("inspect", save(state), "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 1
    assert "1 fault in 10 BatchNorm layers" in page
    assert page.count("<tr class='fault'>") == 1
    assert not re.search(r"<script|https?:|src=|href=|@import|url\(", page)
    assert "&lt;script&gt;" in page


def test_a_figure_is_drawn(state, save, command, tmp_path):
    fill(state, "bn1", 0.0, 0.0)
    fill(state, "head.bn", NAN, NAN)
    code, _ = command("inspect", save(state), "--plot", tmp_path / "figure.png")
    assert code == 1
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_a_figure_in_a_format_that_is_none_is_an_error(state, save, command, tmp_path):
    code, said = command("inspect", save(state), "--plot", tmp_path / "figure.docx")
    assert code == 2
    assert "docx" in said


@pytest.mark.parametrize("option", ["--html", "--plot"])
def test_a_report_replaces_reports_alone(option, state, save, command, tmp_path):
    path = save(state, "file.pt")
    suffix = {"--html": "html", "--plot": "png"}[option]
    (tmp_path / f"link.{suffix}").symlink_to(path)
    (tmp_path / f"hard.{suffix}").hardlink_to(path)
    (tmp_path / "notes.txt").write_text("mine")
    before = path.read_bytes()
    for name in ("file.pt", f"link.{suffix}", f"hard.{suffix}"):
        code, said = command("inspect", path, option, name)
        assert (code, said) == (2, f"lightning-bn inspect: {option} {name} is a file that is read: name another one.\n")
    code, said = command("inspect", path, option, "notes.txt")
    assert code == 2
    assert f"{option} notes.txt exists and is no .{suffix}" in said
    assert (path.read_bytes(), (tmp_path / "notes.txt").read_text()) == (before, "mine")


@pytest.mark.parametrize("option", ["--html", "--plot"])
def test_a_report_replaces_no_shard_and_no_other_report_of_the_same_run(option, state, command, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    suffix = {"--html": "html", "--plot": "png"}[option]
    shard = tmp_path / f"one.{suffix}"
    save_file(state, shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state, shard.name)}))
    before = shard.read_bytes()
    code, said = command("inspect", tmp_path, option, shard.name)
    assert code == 2
    assert "is a file that is read" in said
    assert shard.read_bytes() == before
    code, said = command("inspect", index, "--html", "both", "--plot", "both")
    assert (code, said) == (2, "lightning-bn inspect: --html and --plot name the same file: choose two.\n")
    assert not (tmp_path / "both").exists()


def test_where_matplotlib_is_missing_its_extra_is_named(state, save, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, said = command("inspect", save(state), "--plot", "figure.png")
    assert code == 2
    assert "pip install 'lightning-bn[plot]'" in said
