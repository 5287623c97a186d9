"""The figure: everything is inside, in words, and its colors turn at the threshold."""

from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from torch import Tensor

from lightning_bn.functional import TaskDrift
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.plotting import drift_figure, task_drift_figure

FEW = ("net.features.1", "net.bn", "net.head.1")
MANY = tuple(
    f"model.backbone_2d.blocks.{i // 4}.residual_stage.deformable_convolution.{i % 4}.batch_normalization"
    for i in range(200)
)


def history(names: tuple[str, ...] = FEW, samples: int = 12, scale: float = 0.05, marks: bool = False) -> DriftHistory:
    generator = torch.Generator().manual_seed(0)
    built = DriftHistory()
    for index in range(samples):
        values = scale * torch.rand(len(names), generator=generator, dtype=torch.float64)
        built.append(50 * (index + 1), index // 4, names, values)
    if marks:
        events = ("frozen from the start", "frozen", "recalibrated", "reset", "unfrozen")
        for step, event in zip(range(0, 500, 100), events, strict=True):
            built.mark(step, names[-1], event)
    return built


def drawn(*arguments: Any, **options: Any) -> Any:
    figure = drift_figure(*arguments, **options)
    FigureCanvasAgg(figure).draw()
    return figure


def mesh(figure: Any) -> QuadMesh:
    [found] = [one for one in figure.axes[0].collections if isinstance(one, QuadMesh)]
    return found


def texts(figure: Any) -> list[Any]:
    axes, bar = figure.axes
    legends = [*figure.legends, *(one for one in [axes.get_legend()] if one)]
    return [
        *(text for legend in legends for text in legend.get_texts()),
        *axes.texts,
        axes.title,
        axes.xaxis.label,
        axes.yaxis.label,
        bar.yaxis.label,
        *axes.get_yticklabels(),
        *bar.get_yticklabels(),
    ]


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("names", [FEW, MANY, FEW[:1]], ids=["3", "200", "1"])
def test_no_text_is_cut_off_or_lies_on_another(names: tuple[str, ...], marks: bool) -> None:
    figure = drawn(history(names, marks=marks), "jeffreys")
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure) if text.get_text()]
    for said, box in boxes:
        assert box.x0 >= -1, said
        assert box.y0 >= -1, said
        assert box.x1 <= width + 1, said
        assert box.y1 <= height + 1, said
    for index, (said, box) in enumerate(boxes):
        for other, of_other in boxes[:index]:
            apart = box.x0 >= of_other.x1 - 1 or of_other.x0 >= box.x1 - 1
            apart = apart or box.y0 >= of_other.y1 - 1 or of_other.y0 >= box.y1 - 1
            assert apart, (said, other)


@pytest.mark.parametrize("measure", ["jeffreys", "log_variance_ratio"])
def test_the_label_of_the_color_bar_is_no_longer_than_the_figure(measure: str) -> None:
    figure = drawn(history(), measure)
    label = figure.axes[1].yaxis.label
    assert measure in label.get_text()
    box = label.get_window_extent(figure.canvas.get_renderer())
    assert box.y0 >= 0
    assert box.y1 <= figure.canvas.get_width_height()[1]


@pytest.mark.parametrize(("names", "frozen"), [(FEW, FEW[:2]), (MANY, MANY[:150]), (FEW, ()), (FEW[:1], FEW[:1])])
def test_layers_that_are_frozen_from_the_start_have_a_mark_each_at_the_left_edge(
    names: tuple[str, ...], frozen: tuple[str, ...]
) -> None:
    built = history(names)
    for name in (*frozen, *frozen[:1], "gone.since"):
        built.mark(0, name, "frozen from the start")
    figure = drawn(built, "jeffreys")
    axes = figure.axes[0]
    lines = [line for line in axes.get_lines() if line.get_label() == "frozen from the start"]
    assert [list(line.get_ydata()) for line in lines] == ([list(range(len(frozen)))] if frozen else [])
    assert {x for line in lines for x in line.get_xdata()} <= {axes.get_xlim()[0]}
    said = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert said == (["frozen from the start"] if frozen else [])


def test_axes_have_titles_and_units_and_whole_names() -> None:
    axes = drawn(history(), "jeffreys").axes[0]
    assert "reference" in axes.get_title()
    assert "step" in axes.get_xlabel()
    assert "layer" in axes.get_ylabel()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(FEW)


def test_the_first_layer_is_on_top() -> None:
    axes = drawn(history(), "jeffreys").axes[0]
    bottom, top = axes.get_ylim()
    assert top < bottom


def test_at_200_layers_names_are_fewer_and_whole() -> None:
    axes = drawn(history(MANY), "jeffreys").axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert 20 <= len(labels) <= 70
    assert set(labels) <= set(MANY)
    ticks = [int(tick) for tick in axes.get_yticks()]
    assert labels == [MANY[tick] for tick in ticks]


@pytest.mark.parametrize("threshold", [None, 0.25, 10.0])
def test_colors_turn_at_the_threshold(threshold: float | None) -> None:
    figure = drawn(history(), "jeffreys", threshold=threshold)
    colors = mesh(figure)
    assert float(colors.norm(threshold or 0.1)) == pytest.approx(0.5)
    assert float(colors.norm(0.0)) == 0
    assert any(float(tick) == pytest.approx(threshold or 0.1) for tick in figure.axes[1].get_yticks())


def test_one_exploding_layer_does_not_hide_ten_times_the_threshold() -> None:
    built = history()
    built.append(650, 3, FEW, torch.tensor([1e9, 1.0, 0.0], dtype=torch.float64))
    colors = mesh(drawn(built, "jeffreys"))
    assert float(colors.norm(1.0)) > 0.75


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_drawn_and_not_as_healthy(bad: float) -> None:
    built = history()
    built.append(650, 3, FEW, torch.tensor([bad, 0.0, 0.0], dtype=torch.float64))
    figure = drawn(built, "jeffreys")
    colors = mesh(figure)
    red, _, blue, _ = colors.to_rgba(colors.get_array())[0, -1]
    assert not blue > red


def column(figure: Any) -> Tensor:
    return torch.as_tensor(mesh(figure).get_array()).T


def test_every_sample_is_in_its_place() -> None:
    built = history()
    assert torch.allclose(column(drawn(built, "jeffreys")).double(), built.values())


def test_one_sample_is_enough_and_none_is_an_error() -> None:
    drawn(history(samples=1), "jeffreys")
    with pytest.raises(ValueError, match="no sample"):
        drift_figure(DriftHistory(), "jeffreys")


def test_what_happened_to_layers_is_in_the_legend_by_name() -> None:
    figure = drawn(history(marks=True), "jeffreys")
    legends = [*figure.legends, *(one for one in [figure.axes[0].get_legend()] if one)]
    said = {text.get_text() for legend in legends for text in legend.get_texts()}
    assert {"frozen", "unfrozen", "recalibrated", "reset"} <= said


def test_where_a_layer_was_warming_up_it_is_gray() -> None:
    built = history()
    for name in FEW[:2]:
        built.mark(50, name, "warming up")
    built.mark(300, FEW[0], "warmed up")
    figure = drawn(built, "jeffreys")
    _, gray = (one for one in figure.axes[0].collections if isinstance(one, QuadMesh))
    shown = ~gray.get_array().mask.reshape(len(FEW), len(built))
    assert shown.sum(1).tolist() == [5, 12, 0]
    assert "warming up" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_what_happened_to_most_layers_is_one_line_and_covers_none_of_them() -> None:
    built = history(MANY)
    for name in MANY:
        built.mark(200, name, "recalibrated")
    for name in MANY[:5]:
        built.mark(400, name, "recalibrated")
    figure = drawn(built, "jeffreys")
    axes = figure.axes[0]
    vertical = [line for line in axes.lines if list(line.get_xdata()) == [200, 200]]
    assert len(vertical) == 2, "and its outline"
    marks = {(x, y) for line in axes.lines if len(line.get_xdata()) == 5 for x, y in zip(*line.get_data(), strict=True)}
    assert marks == {(400, row) for row in range(5)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["recalibrated", "recalibrated, most layers"]


def test_marks_that_were_dropped_are_counted_in_the_title() -> None:
    built = history(marks=True)
    assert "left out" not in drawn(built, "jeffreys").axes[0].get_title()
    built.marks_dropped = 12_345
    assert "12,345 marks" in drawn(built, "jeffreys").axes[0].get_title()


def test_marks_of_layers_that_are_gone_are_left_out() -> None:
    built = history()
    built.mark(100, "another.layer", "frozen")
    figure = drawn(built, "jeffreys")
    assert not figure.legends
    assert figure.axes[0].get_legend() is None


# the drift between tasks


def between(layers: tuple[str, ...] = FEW, tasks: int = 3, scale: float = 0.1) -> TaskDrift:
    names = ("detection", "segmentation", "depth", "normals", "edges", "keypoints", "saliency", "parts")[:tasks]
    values = scale * torch.rand(tasks, tasks, len(layers), generator=torch.Generator().manual_seed(1)).double()
    return TaskDrift(names, layers, values * (1 - torch.eye(tasks)[..., None]))


def drawn_between(drift: TaskDrift, **options: Any) -> Any:
    figure = task_drift_figure(drift, **options)
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize("bad", [True, False])
@pytest.mark.parametrize(("layers", "tasks"), [(MANY[:53], 3), (FEW, 8), (MANY[:3], 8), (MANY, 2), (("",), 2)])
def test_no_text_of_the_drift_between_tasks_is_cut_off_or_lies_on_another(
    layers: tuple[str, ...], tasks: int, bad: bool
) -> None:
    drift = between(layers, tasks)
    drift.values[0, 1, 0] = float("nan") if bad else 0.0
    figure = drawn_between(drift)
    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    labels = [*texts(figure), *figure.axes[0].get_xticklabels()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in labels if text.get_text()]
    for index, (said, box) in enumerate(boxes):
        assert min(box.x0, box.y0) >= -1, said
        assert box.x1 <= width + 1, said
        assert box.y1 <= height + 1, said
        for other, of_other in boxes[:index]:
            apart = box.x0 >= of_other.x1 - 1 or of_other.x0 >= box.x1 - 1
            assert apart or box.y0 >= of_other.y1 - 1 or of_other.y0 >= box.y1 - 1, (said, other)


def test_every_pair_of_tasks_and_every_layer_has_its_place() -> None:
    drift = between()
    axes = drawn_between(drift).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(FEW)
    assert [label.get_text() for label in axes.get_xticklabels()] == [" / ".join(pair) for pair in drift.pairs()]
    bottom, top = axes.get_ylim()
    assert top < bottom, "the first layer is on top"
    shown = torch.as_tensor(mesh(drawn_between(drift)).get_array())
    assert torch.allclose(shown, torch.tensor([*drift.pairs().values()]).T.double())


@pytest.mark.parametrize("above", [0.1, 0.5])
def test_the_colors_of_tasks_turn_where_a_layer_needs_a_set_for_each(above: float) -> None:
    figure = drawn_between(between(), above=above)
    norm = mesh(figure).norm
    assert float(norm(above)) == pytest.approx(0.5)
    assert float(norm(above * 10)) == pytest.approx(0.75), "logarithmic"
    assert f"{above:g}" in [label.get_text() for label in figure.axes[1].get_yticklabels()]


@pytest.mark.parametrize(("bad", "color"), [(float("nan"), "black"), (float("inf"), "red")])
def test_a_drift_between_tasks_that_is_not_finite_is_not_drawn_as_healthy(bad: float, color: str) -> None:
    drift = between()
    drift.values[1, 0, 0] = bad
    figure = drawn_between(drift)
    colors = mesh(figure)
    red, green, blue, _ = colors.to_rgba(colors.get_array())[0, 0]
    assert (red + green + blue == 0) if color == "black" else (red > 0.5 and red > blue)
    said = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert said == (["not a number"] if color == "black" else [])


def test_no_window_is_opened_and_no_setting_changed() -> None:
    before = dict(mpl.rcParams)
    drawn(history(), "jeffreys")
    drawn_between(between())
    assert dict(mpl.rcParams) == before
    assert mpl._pylab_helpers.Gcf.get_num_fig_managers() == 0
