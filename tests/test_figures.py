"""What the figures of the documentation show is so."""

import importlib.util
import re
from pathlib import Path

import pytest

from lightning_bn.functional.monitoring.history import FROM_THE_START

DOCS = Path(__file__).parent.parent / "docs"
MONITOR = (DOCS / "monitor.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def figures():
    """docs/figures.py, which finds the main example's files as scripts find their neighbors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS.parent / "examples" / "digits_multitask"))
        spec = importlib.util.spec_from_file_location("figures_of_the_docs", DOCS / "figures.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def test_what_moves_after_each_switch(figures):
    found = figures.courses()
    moves = {
        name: (one.normalizes_with, one.mean[0] != one.mean[-1], len(set(one.weight)) > 1)
        for name, one in found.items()
    }
    assert moves == {
        ".train()": ("batch", True, True),
        ".eval()": ("running", False, True),
        "requires_grad_(False)": ("batch", True, False),
        "track_running_stats = False later": ("batch", False, True),
        "freeze_batch_norm": ("running", False, False),
    }


def test_a_panel_says_in_words_what_its_curve_does(figures):
    panels = [[text.get_text() for text in axes.texts] for axes in figures.what_moves().axes]
    assert [words[0] for words in panels] == [
        *["moves"] * 2,
        "stays",
        *["moves"] * 2,
        "stays",
        "stays",
        "moves",
        *["stays"] * 2,
    ]


@pytest.fixture(scope="module")
def monitor(figures, tmp_path_factory):
    """The fit that the heatmap shows; it is slow."""
    return figures.fitted(tmp_path_factory.mktemp("fit"))


def test_the_heatmap_shows_what_its_numbers_are_explained_with(figures, monitor):
    history = monitor.history
    drift = dict(zip(history.names, history.values().T, strict=True))
    events = {(name, event): step for step, name, event in history.marks}
    assert not drift["encoder.0.1"].any()
    assert not drift["encoder.1.1"].any()
    assert {name for name, event in events if event == FROM_THE_START} == {"encoder.0.1", "encoder.1.1"}
    assert {name for name, event in events if event == "warming up"} == {"decoder.0.1", "decoder.1.1"}
    assert all(events[name, "warmed up"] == 45 for name in ("decoder.0.1", "decoder.1.1"))
    change, freeze = (
        next(i for i, step in enumerate(history.steps) if step > at) for at in (figures.CHANGE, figures.FREEZE)
    )
    jumps = {name: float(values[change] - values[change - 1]) for name, values in drift.items()}
    assert max(jumps, key=jumps.get) == "encoder.2.1"
    assert drift["encoder.2.1"][change - 1] < 0.5 < 1 < drift["encoder.2.1"][change]
    assert (drift["encoder.3.1"][freeze:] == drift["encoder.3.1"][freeze]).all()
    assert drift["encoder.3.1"][freeze] > 0
    assert drift["decoder.1.1"][change - 15] < 0.1 < drift["decoder.1.1"][-1]
    numbers = re.findall(r"^(\d)\. ", MONITOR, re.M)
    assert [*map(int, numbers)] == [*figures.NUMBERS]
    assert f"doubled at step {figures.CHANGE}" in MONITOR
    assert f"at step {figures.FREEZE} of the schedule" in MONITOR
    assert figures.GAIN == 2


def test_both_lines_of_a_panel_are_the_same_training(figures):
    averaged = next(setting for setting in figures.lagging.SETTINGS if setting.decay is not None)
    plain, precise = (figures.fit_of(averaged, 0, precise) for precise in (False, True))
    assert plain[0] == precise[0]  # the loss of every epoch
    assert plain[0][0] > plain[0][-1]
    assert all(low < high for low, high in zip(plain[1], precise[1], strict=True))
