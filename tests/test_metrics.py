"""The metric gives what the functions give, over updates, processes and devices of its own, and draws it readably."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn
from torchmetrics import MetricCollection

from lightning_bn import BatchNormDrift
from lightning_bn.functional import MEASURES, drift, take_snapshot
from tests.callbacks.fits import quiet, train_loader, val_loader
from tests.callbacks.monitoring_fits import TamperedClassifier, pretrained
from tests.functional.statistics.test_drift_measures import layer_with
from tests.metric_ranks import BY_RANK
from tests.models import SmallResNet, fill_statistics, seeded
from tests.ranks import Results, results_of

NAN = float("nan")


def moved(model: nn.Module, seed: int) -> nn.Module:
    return fill_statistics(copy.deepcopy(model), seed)


def numbers(result: dict[str, torch.Tensor]) -> dict[str, float]:
    assert all(value.dtype == torch.float64 and value.ndim == 0 for value in result.values())
    return {name: float(value) for name, value in result.items()}


@pytest.mark.parametrize("measure", MEASURES)
def test_it_is_the_drift_of_all_channels_averaged_over_updates(measure: Any) -> None:
    start = fill_statistics(seeded(SmallResNet))
    metric = BatchNormDrift(start, measure, threshold=0.3)
    channels = []
    for seed in (1, 2, 3):
        metric.update(moved(start, seed))
        by_layer = drift(take_snapshot(start), take_snapshot(moved(start, seed)), measure)
        channels.append(torch.cat(list(by_layer.values())).abs())
    means = torch.stack(channels).mean(0)
    assert numbers(metric.compute()) == pytest.approx(
        {
            f"{measure}_mean": float(means.mean()),
            f"{measure}_p95": float(means.quantile(0.95)),
            f"{measure}_max": float(torch.stack(channels).max()),
            f"{measure}_share_above": float((means > 0.3).double().mean()),
        }
    )


def test_a_forward_gives_this_update_alone_and_compute_all_of_them() -> None:
    metric = BatchNormDrift(layer_with([0.0], [1.0]), "mean_shift")
    sigma = (1 + 1e-3) ** 0.5
    assert numbers(metric(layer_with([1.0], [1.0])))["mean_shift_max"] == pytest.approx(1 / sigma)
    assert numbers(metric(layer_with([-3.0], [1.0])))["mean_shift_max"] == pytest.approx(3 / sigma)
    assert numbers(metric(layer_with([0.0], [1.0])))["mean_shift_max"] == 0.0
    assert numbers(metric.compute()) == pytest.approx(
        {"mean_shift_mean": 4 / 3 / sigma, "mean_shift_p95": 4 / 3 / sigma, "mean_shift_max": 3 / sigma}
    )


def test_reset_forgets_updates_and_keeps_the_reference() -> None:
    metric = BatchNormDrift(layer_with([0.0], [1.0]))
    metric.update(layer_with([9.0], [1.0]))
    metric.reset()
    metric.update(layer_with([0.0], [1.0]))
    assert set(numbers(metric.compute()).values()) == {0.0}


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric BatchNormDrift was called before")
def test_before_the_first_update_nothing_is_made_up() -> None:
    metric = BatchNormDrift(layer_with([0.0], [1.0]), threshold=0.1)
    assert all(value != value for value in numbers(metric.compute()).values())
    assert all(value != value for value in metric.layers().values())


def test_channels_infinitely_far_away_are_infinitely_far_in_every_aggregate() -> None:
    metric = BatchNormDrift(layer_with([0.0] * 4, [1.0] * 4))
    metric.update(layer_with([float("inf")] * 4, [1.0] * 4))
    assert set(numbers(metric.compute()).values()) == {float("inf")}


def test_no_result_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="no result"):
        BatchNormDrift(layer_with([0.0], [1.0])).plot([])


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_channel_that_is_not_finite_is_not_hidden(bad: float) -> None:
    metric = BatchNormDrift(nn.ModuleDict({"a": layer_with([0.0], [1.0]), "b": layer_with([0.0] * 3, [1.0] * 3)}))
    metric.threshold = 0.1
    metric.update(nn.ModuleDict({"a": layer_with([0.5], [1.0]), "b": layer_with([0.0, bad, 0.0], [1.0] * 3)}))
    found = numbers(metric.compute())
    assert not found["jeffreys_max"] < float("inf")
    assert not found["jeffreys_mean"] < float("inf")
    assert found["jeffreys_share_above"] == 0.5
    assert list(metric.layers()) == ["b", "a"]


def test_the_model_is_neither_held_nor_a_part_of_the_metric() -> None:
    model = fill_statistics(seeded(SmallResNet))
    metric = BatchNormDrift(model)
    assert list(metric.modules()) == [metric]
    assert metric.state_dict() == {}
    fill_statistics(model, 5)
    metric.update(model)
    assert float(metric.compute()["jeffreys_max"]) > 0


def test_half_precision_of_what_holds_it_leaves_reference_and_sums_alone() -> None:
    holder = nn.ModuleDict({"metric": BatchNormDrift(layer_with([1 / 3], [1.0])), "layer": nn.Linear(2, 2)}).half()
    metric = holder["metric"]
    assert isinstance(metric, BatchNormDrift)
    metric.update(layer_with([1 / 3], [1.0]))
    assert set(numbers(metric.compute()).values()) == {0.0}


def test_selection_and_snapshots_are_accepted() -> None:
    start = fill_statistics(seeded(SmallResNet))
    metric = BatchNormDrift(start, modules="layer1", exclude="layer1.1")
    metric.update(take_snapshot(moved(start, 1), "layer1", exclude="layer1.1"))
    assert set(metric.layers()) == {"layer1.0.bn1", "layer1.0.bn2"} & set(metric.layers())
    assert all(name.startswith("layer1.0") for name in metric.layers())


def test_another_model_names_the_layers_that_differ_and_changes_nothing() -> None:
    metric = BatchNormDrift(fill_statistics(seeded(SmallResNet)))
    metric.update(fill_statistics(seeded(SmallResNet), 1))
    before = metric.sums.clone()
    with pytest.raises(ValueError, match=r"differ in 'bn1'"):
        metric.update(nn.ModuleDict({"bn1": nn.BatchNorm1d(3)}))
    assert torch.equal(metric.sums, before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"measure": "jefreys"}, r"measure='jefreys'.*jeffreys"), ({"threshold": 0.0}, r"threshold=0.0.*positive")],
)
def test_arguments_out_of_range_name_the_value_and_the_way_out(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BatchNormDrift(nn.BatchNorm1d(2), **arguments)


def test_it_can_be_copied_pickled_and_collected() -> None:
    metric = BatchNormDrift(layer_with([0.0], [1.0]))
    metric.update(layer_with([1.0], [1.0]))
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert numbers(twin.compute()) == numbers(metric.compute())


def test_in_a_collection_each_has_its_own_numbers() -> None:
    def model(shift: float) -> nn.Module:
        return nn.ModuleDict({"a": layer_with([shift], [1.0]), "b": layer_with([3 * shift], [1.0])})

    built = {
        "jeffreys": BatchNormDrift(model(0.0)),
        "shift": BatchNormDrift(model(0.0), "mean_shift"),
        "a": BatchNormDrift(model(0.0), "hellinger", modules="a"),
        "b": BatchNormDrift(model(0.0), "hellinger", modules="b"),
    }
    together = MetricCollection({name: copy.deepcopy(one) for name, one in built.items()})
    for shift in (0.0, 0.5):
        # The first one is no drift at all, in which all states are equal.
        together.update(model(shift))
        for one in built.values():
            one.update(model(shift))
    together.compute()
    for name, one in built.items():
        assert numbers(together[name].compute()) == numbers(one.compute())
    assert float(together["b"].compute()["hellinger_max"]) > float(together["a"].compute()["hellinger_max"])


def test_log_dict_takes_it_from_a_module_that_holds_it() -> None:
    class Logging(TamperedClassifier):
        def on_fit_start(self) -> None:
            self.drift = BatchNormDrift(self.net)

        def on_train_batch_end(self, *_: Any) -> None:
            self.log_dict(self.drift(self.net), on_step=True, on_epoch=False)

        def on_validation_epoch_end(self) -> None:
            self.log_dict({f"so far/{key}": value for key, value in self.drift.compute().items()})

    pl.seed_everything(0, verbose=False)
    trainer = quiet(max_epochs=1, num_sanity_val_steps=0)
    module = Logging(pretrained())
    trainer.fit(module, train_loader(), val_loader())
    found = trainer.callback_metrics
    assert {"jeffreys_max", "so far/jeffreys_max"} <= set(found)
    assert float(found["so far/jeffreys_max"]) >= float(found["jeffreys_max"]) > 0


# --- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.metric_ranks", 3, tmp_path_factory, 60)


def test_processes_merge_totals_and_largest_with_one_tensor(ranks: Results) -> None:
    one = BatchNormDrift(layer_with([0.0, 0.0], [1.0, 1.0]), threshold=0.5)
    for updates in BY_RANK:
        for mean, var in updates:
            one.update(layer_with(mean, var))
    for rank in ranks:
        assert rank["one"]["computed"] == pytest.approx(numbers(one.compute()))
        assert rank["one"]["gathered"] == 1


def test_after_the_exchange_each_rank_has_its_own_sums_again(ranks: Results) -> None:
    assert math.isnan(ranks[2]["one"]["own"][""])
    assert ranks[0]["one"]["own"] != ranks[1]["one"]["own"]


# --- figures -------------------------------------------------------------------------------------------------------


def drawn(figure: Any) -> Any:
    FigureCanvasAgg(figure).draw()
    return figure


def test_the_plot_has_a_bar_for_each_layer_the_worst_on_top_with_whole_names() -> None:
    start = fill_statistics(seeded(SmallResNet))
    metric = BatchNormDrift(start, threshold=0.2)
    metric.update(moved(start, 1))
    figure, axes = metric.plot()
    drawn(figure)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(metric.layers())
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(list(metric.layers().values()))
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    box = figure.bbox
    for label in axes.get_yticklabels():
        extent = label.get_window_extent()
        assert extent.x0 >= box.x0
        assert extent.x1 <= box.x1
    assert "jeffreys" in axes.get_xlabel()


def test_a_layer_that_is_not_finite_is_said_to_be_so_in_the_plot() -> None:
    metric = BatchNormDrift(layer_with([0.0], [1.0]))
    metric.update(layer_with([NAN], [1.0]))
    figure, axes = metric.plot()
    drawn(figure)
    assert [text.get_text() for text in axes.texts] == ["not finite"]


def test_only_the_worst_layers_are_drawn_and_the_others_counted() -> None:
    many = nn.ModuleList(nn.BatchNorm1d(1) for _ in range(40))
    metric = BatchNormDrift(many)
    metric.update(many)
    figure, axes = metric.plot()
    drawn(figure)
    assert len(axes.patches) == 30
    assert "10 more layers moved less" in axes.get_title()


def test_results_are_curves_drawn_where_one_wants_them(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    metric = BatchNormDrift(layer_with([0.0], [1.0]), threshold=0.1)
    results = [metric(layer_with([shift], [1.0])) for shift in (0.1, 0.5, 0.2)]
    own = Figure().add_subplot()
    figure, axes = metric.plot(results, own)
    assert axes is own
    assert figure is own.get_figure()
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert set(lines) == {"jeffreys_mean", "jeffreys_p95", "jeffreys_max", "threshold 0.1"}
    assert lines["jeffreys_max"] == pytest.approx([float(result["jeffreys_max"]) for result in results])
    figure, _ = metric.plot(results[0])
    drawn(figure)


@pytest.mark.parametrize(
    "arguments",
    [
        {"threshold": "a"},
        {"threshold": True},
        {"threshold": {}},
        {"threshold": float("nan")},
        {"measure": []},
        {"reference": None},
        {"reference": "file.pt"},
    ],
    ids=str,
)
def test_arguments_of_another_kind_are_refused_by_their_names(arguments):
    with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
        BatchNormDrift(**{"reference": nn.BatchNorm1d(2), **arguments})
