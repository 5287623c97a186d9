"""Planted faults in real fits: each is named with the right layer and sentence, and a healthy run is not."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_bn import BatchNormFreezer, PreciseBatchNorm
from lightning_bn.functional import freeze_batch_norm
from tests.callbacks.fits import Net, quiet
from tests.callbacks.monitoring_fits import TamperedClassifier, csv_rows, fit, monitor, norms, pretrained, warned
from tests.models import SharedNorm, seeded
from tests.pages import lines
from tests.ranks import ROOT, Results, results_of

FIRST = "net.features.1"


def from_step(start: int, gain: float = 1.0, shift: float = 0.0) -> Any:
    return lambda x, step: x * gain + shift if step >= start else x


# --- drift of the inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [from_step(40, gain=2.0), from_step(40, shift=4.0)])
def test_inputs_that_change_in_mid_run_are_warned_of_once_with_layer_and_step(fault: Any) -> None:
    said = fit(TamperedClassifier(pretrained(), fault, lr=1e-3), monitor(warn_above=0.8))
    [line] = [line for line in said if "freeze it or give each task its own statistics" in line]
    assert FIRST in line
    assert "since the start of the fit" in line
    step = int(line.split("step ")[1].split(":")[0])
    assert 40 < step <= 50


def test_a_changed_input_moves_the_variance_that_is_named_by_its_factor() -> None:
    watching = monitor()
    fit(TamperedClassifier(pretrained(), from_step(0, gain=2.0), lr=1e-5), watching, max_epochs=3)
    # Means of 1.5 to 2.5 and standard deviations of 2 double: variance x4 in every channel.
    layer = watching.history.names.index(FIRST)
    assert float(watching.history.values()[-1, layer]) > 1.0


@pytest.mark.parametrize("every_n_steps", [1, 10])
def test_the_warning_says_since_when_inputs_are_others(every_n_steps: int) -> None:
    fault, watching = from_step(200, shift=4.0), monitor(warn_above=2.0, every_n_steps=every_n_steps)
    said = fit(TamperedClassifier(pretrained(), fault, lr=1e-4), watching, max_epochs=10)
    [line] = [line for line in said if "above warn_above" in line]
    since = int(line.split("its inputs changed at about step ")[1].split(";")[0])
    assert 200 - every_n_steps <= since <= 205


def test_a_change_of_task_on_digits_is_named_with_layer_and_step() -> None:
    pl.seed_everything(0, verbose=False)
    net = Digits()

    class Tasks(DigitsModule):
        changes_at = 10_000

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # The other task has negatives: the same digits, dark on light.
            x, y = batch
            return super().training_step((-x if self.trainer.global_step >= self.changes_at else x, y), batch_idx)

    train, val = digits(32, 0)
    first, second = Tasks(net, 0.02), Tasks(net, 0.002)
    second.changes_at = 100
    quiet(max_epochs=3).fit(first, train, val)
    watching = monitor(every_n_steps=5, warn_above=1.0)
    said = warned(lambda: quiet(callbacks=[watching], max_epochs=5).fit(second, train, val))
    [line] = [line for line in said if "above warn_above" in line]
    step, since = (int(line.split(word)[1].split(end)[0]) for word, end in (("step ", ":"), ("about step ", ";")))
    assert 100 < step <= 120
    assert 95 <= since <= 110
    assert line.split(": ")[2].startswith("net.")


@pytest.mark.parametrize("reference", ["previous_epoch", "recalibrated"])
def test_where_the_reference_moves_along_no_change_of_inputs_is_claimed(reference: str) -> None:
    watching = monitor(reference=reference, warn_above=0.15)
    said = fit(TamperedClassifier(seeded(lambda: Net(dropout=0.0)), lr=0.3), watching, max_epochs=6)
    assert [line for line in said if "above warn_above" in line]
    assert not [line for line in said if "inputs changed" in line]


# --- channels that die, variances that explode ---------------------------------------------------------------------


class Zeroed(pl.Callback):
    """Before every batch from a step on, half of the channels that reach `net.bn` are made constant."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= 20:
            with torch.no_grad():
                pl_module.net.features[4].weight[:2] = 0


def test_channels_that_die_are_named_once_and_counted_in_a_curve(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    watching = monitor(every_n_steps=5)
    said = fit(TamperedClassifier(pretrained(), lr=1e-3), Zeroed(), watching, max_epochs=6, logger=logger)
    [line] = said
    # The first of the two to fall.
    assert "net.bn has 1 channel whose variance fell below eps" in line
    assert float(csv_rows(logger)[0]["bn/collapsed_channels"]) == 0
    assert float(csv_rows(logger)[-1]["bn/collapsed_channels"]) == 2


def test_inputs_that_are_constant_from_the_start_have_not_died() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.net = nn.BatchNorm2d(3), Net(dropout=0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.bn(x * torch.tensor([1.0, 0.0, 1.0])[:, None, None]))

    assert fit(TamperedClassifier(seeded(Masked)), monitor(every_n_steps=10), max_epochs=6) == []


def test_inputs_on_another_scale_explode_in_the_first_layer() -> None:
    said = fit(TamperedClassifier(pretrained(), from_step(40, gain=255.0), lr=1e-4), monitor(), max_epochs=3)
    [line] = [line for line in said if "has running variances" in line and "times those of the reference" in line]
    assert f": {FIRST} has" in line
    assert "0 to 255" in line
    assert not [line for line in said if "alternate" in line]


# --- what is not finite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_bad_batch_is_named_at_its_step_before_validation(bad: float) -> None:
    said = fit(TamperedClassifier(pretrained(), lambda x, step: x * bad if step == 20 else x), monitor(), max_epochs=1)
    assert said[0].startswith(f"BatchNormMonitor: step 21: {FIRST} ")
    assert all("4 channels whose running statistics are not finite" in line for line in said)


def test_one_bad_batch_is_one_line_whatever_lies_behind_it() -> None:
    said = fit(
        TamperedClassifier(pretrained(), lambda x, step: x * torch.inf if step == 20 else x), monitor(), max_epochs=1
    )
    assert len(said) == 1, said


def test_untrained_layers_too_are_named_when_they_are_not_finite() -> None:
    said = fit(
        TamperedClassifier(seeded(Net), lambda x, step: x * torch.inf if step == 3 else x), monitor(), max_epochs=1
    )
    assert said
    assert f"step 4: {FIRST}" in said[0]


# --- counters ------------------------------------------------------------------------------------------------------


class Branched(nn.Module):
    """A branch that no forward reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.main = Net(0.0)
        self.branch = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def branched(trained: bool) -> nn.Module:
    net = pretrained(seeded(Branched))
    if trained:
        net.branch[1].running_mean.fill_(0.3)  # type: ignore[index, union-attr]
        net.branch[1].num_batches_tracked.fill_(100)  # type: ignore[index, union-attr]
    return net


@pytest.mark.parametrize("every_n_steps", [1, 5, 20])
@pytest.mark.parametrize("trained", [True, False])
def test_a_branch_that_no_forward_reaches_is_stalled(trained: bool, every_n_steps: int) -> None:
    said = fit(TamperedClassifier(branched(trained)), monitor(every_n_steps=every_n_steps), max_epochs=2)
    assert len(said) == 1, said
    assert "net.branch.1 is in train mode but was not updated in" in said[0]


def test_a_branch_that_stalls_is_named_in_a_fit_shorter_than_the_interval() -> None:
    said = fit(TamperedClassifier(branched(True)), monitor(every_n_steps=50), max_epochs=1, count=8 * 30)
    assert len(said) == 1, said
    assert "is in train mode but was not updated in 30 batches" in said[0]


def test_a_layer_that_never_follows_because_its_momentum_is_0_is_stalled() -> None:
    net = pretrained()
    norms(net)[1].momentum = 0.0
    [line] = fit(TamperedClassifier(net, lr=1e-3), monitor(every_n_steps=10), max_epochs=1)
    assert "net.bn is in train mode but was not updated" in line


def test_a_layer_whose_tracking_was_switched_off_is_stalled() -> None:
    net = pretrained()
    net.bn.track_running_stats = False  # type: ignore[union-attr]
    [line] = fit(TamperedClassifier(net), monitor(every_n_steps=20), max_epochs=2)
    assert "net.bn is in train mode but was not updated" in line
    assert "its track_running_stats was switched off" in line


def test_a_layer_in_eval_is_not_called_stalled() -> None:
    class Eval(TamperedClassifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.net.bn.eval()

    assert fit(Eval(pretrained()), monitor(every_n_steps=20), max_epochs=2) == []


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = SharedNorm()
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).mean((2, 3)))


@pytest.mark.parametrize("every_n_steps", [1, 10])
def test_a_layer_used_twice_in_a_forward_is_named_and_its_neighbor_is_not(every_n_steps: int) -> None:
    said = fit(TamperedClassifier(pretrained(seeded(Twice))), monitor(every_n_steps=every_n_steps), max_epochs=1)
    [line] = said
    assert "net.body.first.norm is updated 2 times per batch" in line


# --- frozen layers -------------------------------------------------------------------------------------------------


def test_many_layers_used_twice_are_one_line() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(dropout=0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.net(x.flip(-1))

    [line] = fit(TamperedClassifier(pretrained(seeded(Pair)), lr=1e-3), monitor(), max_epochs=2)
    assert "net.net.features.1 (and 2 more layers) is updated 2 times per batch" in line


def trained_by(module: TamperedClassifier, start: int) -> TamperedClassifier:
    def fault(x: Tensor, step: int) -> Tensor:
        if step >= start:
            module.net.bn.training = True
        return x

    module.fault = fault
    return module


def written_by(module: TamperedClassifier, start: int) -> TamperedClassifier:
    def fault(x: Tensor, step: int) -> Tensor:
        if step >= start:
            module.net.bn.running_mean.add_(0.5)
        return x

    module.fault = fault
    return module


@pytest.mark.parametrize("move", [trained_by, written_by])
def test_a_frozen_layer_that_moves_is_named(move: Any) -> None:
    module = TamperedClassifier(pretrained())
    freeze_batch_norm(module.net.bn)
    said = [line for line in fit(move(module, 20), monitor(), max_epochs=2) if "frozen" in line]
    [line] = said
    assert line.startswith("BatchNormMonitor: step 21: net.bn is frozen by freeze_batch_norm, but its statistics were")


@pytest.mark.parametrize("freezer_first", [True, False])
def test_a_layer_that_the_freezer_keeps_is_no_fault(freezer_first: bool) -> None:
    callbacks: list[Any] = [BatchNormFreezer("net.bn"), monitor()]
    module = TamperedClassifier(pretrained())
    assert fit(module, *(callbacks if freezer_first else callbacks[::-1]), max_epochs=2) == []


def test_a_scheduled_freeze_and_unfreeze_are_marked_and_no_fault() -> None:
    watching = monitor()
    said = fit(
        TamperedClassifier(pretrained()),
        BatchNormFreezer("net.bn", start_epoch=1, stop_epoch=2),
        watching,
        max_epochs=4,
    )
    assert said == []
    marks = [(event, layer) for _, layer, event in watching.history.marks]
    assert marks == [("frozen", "net.bn"), ("unfrozen", "net.bn")]
    (frozen, *_), (unfrozen, *_) = watching.history.marks
    assert 32 <= frozen <= 33
    assert 64 <= unfrozen <= 65


# --- sources and lag -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_n_steps", [1, 2, 3, 4, 10, 50])
def test_two_sources_that_alternate_batch_by_batch_are_named_whatever_the_interval(every_n_steps: int) -> None:
    module = TamperedClassifier(pretrained(), lambda x, step: x + (6.0 if step % 2 else -6.0), lr=1e-3)
    said = fit(module, monitor(every_n_steps=every_n_steps), max_epochs=1, count=8 * max(64, 10 * every_n_steps))
    assert len(said) == 1, said
    assert f"{FIRST}" in said[0]
    assert "gets its batches from sources that alternate" in said[0]
    assert "lags" not in said[0]


@pytest.mark.parametrize(("batches", "every_n_steps"), [(41, 10), (33, 16)])
def test_alternation_is_named_where_the_eighth_sampled_batch_is_before_validation(
    batches: int, every_n_steps: int
) -> None:
    module = TamperedClassifier(pretrained(), lambda x, step: x + (6.0 if step % 2 else -6.0), lr=1e-3)
    said = fit(module, monitor(every_n_steps=every_n_steps), max_epochs=4, count=8 * batches)
    assert len([line for line in said if "sources that alternate" in line]) == 1, said


@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_alternation_is_named_for_small_batches_too(batch_size: int) -> None:
    module = TamperedClassifier(pretrained(), lambda x, step: x + (8.0 if step % 2 else -8.0), lr=1e-3)
    said = fit(module, monitor(), max_epochs=1, batch_size=batch_size, count=32 * batch_size)
    assert len([line for line in said if "sources that alternate" in line]) == 1, said


def test_a_schedule_of_momentum_is_not_taken_for_sources() -> None:
    class Scheduled(TamperedClassifier):
        def on_train_start(self) -> None:
            for layer in norms(self):
                layer.momentum = 0.3

    net = pretrained()
    for layer in norms(net):
        layer.momentum = 0.01
    assert fit(Scheduled(net, lr=1e-3), monitor(), max_epochs=2) == []


def test_two_sources_mixed_in_every_batch_are_no_fault() -> None:
    sign = torch.tensor([6.0, -6.0]).repeat(16)[:, None, None, None]
    # Statistics of the mixture first: nothing lags.
    net = seeded(lambda: Net(dropout=0.0))
    module = TamperedClassifier(net, lambda x, step: x + sign, lr=1e-3)
    assert fit(module, monitor(), batch_size=32, count=512, max_epochs=5) == []


@pytest.mark.parametrize("every_n_steps", [1, 4])
def test_a_moving_average_too_slow_for_its_batches_lags(every_n_steps: int) -> None:
    net = pretrained()
    for layer in norms(net):
        layer.momentum = 0.001
        layer.num_batches_tracked.fill_(10_000)  # type: ignore[union-attr, operator]
    module = TamperedClassifier(net, lambda x, step: x + 5, lr=1e-4)
    said = fit(module, monitor(every_n_steps=every_n_steps), max_epochs=2)
    assert len(said) == 1, said
    assert FIRST in said[0]
    assert "has a moving average that lags" in said[0]
    assert "PreciseBatchNorm" in said[0]


class Digits(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class DigitsModule(pl.LightningModule):
    def __init__(self, net: nn.Module, lr: float, parity: bool = False) -> None:
        super().__init__()
        self.net, self.lr, self.parity = net, lr, parity

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y % 2 if self.parity else y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def digits(batch_size: int, seed: int) -> tuple[Any, Any]:
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(data.target)
    shuffled = torch.Generator().manual_seed(seed)
    train = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size, shuffle=True, drop_last=True, generator=shuffled)
    return train, DataLoader(TensorDataset(x[1400:], y[1400:]), 128)


@pytest.mark.parametrize(
    ("seed", "batch_size", "every_n_steps"), [(0, 32, 1), (1, 64, 1), (2, 32, 10), (3, 64, 10), (4, 32, 1)]
)
def test_a_healthy_run_on_digits_raises_no_alarm_from_scratch_nor_in_fine_tuning(
    seed: int, batch_size: int, every_n_steps: int
) -> None:
    pl.seed_everything(seed, verbose=False)
    net = Digits()

    def run(lr: float, parity: bool, epochs: int) -> list[str]:
        module = DigitsModule(net, lr, parity)
        watching = monitor(every_n_steps=every_n_steps)
        return warned(lambda: quiet(callbacks=[watching], max_epochs=epochs).fit(module, *digits(batch_size, seed)))

    assert run(0.02, False, 4) == []
    net.head[3] = nn.Linear(24, 2)
    # The same images, another task: statistics follow slowly and in small steps.
    assert run(0.005, True, 2) == []


# --- resets and recalibrations by others -----------------------------------------------------------------------------


class Reset(pl.Callback):
    """Resets all layers before one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            for layer in norms(pl_module):
                layer.reset_running_stats()


@pytest.mark.parametrize("every_n_steps", [1, 10])
def test_a_reset_by_another_callback_re_baselines_instead_of_alarming(every_n_steps: int) -> None:
    watching = monitor(every_n_steps=every_n_steps, warn_above=3.0, act_above=3.0, action="raise")
    module = TamperedClassifier(pretrained(), lr=1e-4)
    assert fit(module, Reset(71), watching, max_epochs=4) == []
    assert {(layer, event) for _, layer, event in watching.history.marks} == {
        (name, event) for name in watching.history.names for event in ("reset", "warming up", "warmed up")
    }
    # Not a sample is above what the run has without a reset, while and after the average fills.
    assert float(watching.history.values().max()) < 3.0


def test_swa_resets_statistics_without_an_alarm() -> None:
    watching = monitor(warn_above=6.0, act_above=6.0, action="raise")
    swa = StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=1)
    assert fit(TamperedClassifier(pretrained(), lr=1e-3), swa, watching, max_epochs=4) == []
    assert {event for _, _, event in watching.history.marks} == {"reset", "warmed up"}


@pytest.mark.parametrize("restore", [True, False])
def test_a_recalibration_is_marked_and_no_fault(restore: bool) -> None:
    watching = monitor()
    precise = PreciseBatchNorm(10, restore=restore)
    assert fit(TamperedClassifier(pretrained(), lr=0.005), precise, watching, max_epochs=3) == []
    marks = [(step, layer, event) for step, layer, event in watching.history.marks]
    assert {event for _, _, event in marks} == {"recalibrated"}
    assert [step for step, layer, _ in marks if layer == FIRST] == [32, 64, 96]


# --- ranks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of("tests.callbacks.monitoring_ranks", 2, tmp_path_factory, 100)


def test_a_rank_with_other_data_is_named_once_with_the_first_layer(ranks: Results) -> None:
    said = [line for line in ranks[0]["other data"]["said"] if "rank 0" in line]
    assert len(said) == 1, ranks[0]["other data"]["said"]
    assert FIRST in said[0]
    assert "gets data on one rank" in said[0]
    assert "evaluation uses only the moving average of rank 0" in said[0]


def test_what_is_not_finite_on_another_rank_alone_is_said(ranks: Results) -> None:
    [line] = [line for line in ranks[0]["other not finite"]["said"] if "not finite" in line]
    assert f"{FIRST} (and 2 more layers) has 4 channels whose running statistics are not finite on another rank" in line


def test_a_reset_on_one_rank_alone_leaves_neither_waiting(ranks: Results) -> None:
    for rank in ranks:
        assert rank["other reset"]["steps"] == rank["other reset"]["planned"]


def test_small_batches_of_each_rank_are_named_where_nothing_is_synchronized(ranks: Results) -> None:
    [line] = ranks[0]["small"]["said"]
    assert "normalizes the 2 samples of each rank separately" in line
    assert "Trainer(sync_batchnorm=True) normalizes 4 samples together" in line
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert lines(line.split(": ", 2)[2])[0] in lines(page)
    assert ranks[0]["small, synchronized"]["said"] == []


def test_ranks_with_data_alike_are_no_fault(ranks: Results) -> None:
    for rank in ranks:
        assert rank["alike"]["said"] == []


@pytest.mark.parametrize("scenario", ["stop", "stop, not finite", "raise"])
def test_drift_on_one_rank_ends_the_run_on_all_of_them_at_the_same_step(ranks: Results, scenario: str) -> None:
    first, second = (rank[scenario] for rank in ranks)
    assert first["steps"] == second["steps"] < first["planned"]
    if scenario == "raise":
        assert "act_above" in first["error"]
        assert "act_above" in second["error"]
    else:
        assert [line for line in first["said"] if "training stops" in line]


def test_what_is_monitored_is_the_same_on_all_ranks(ranks: Results) -> None:
    first, second = (rank["other data"]["metrics"] for rank in ranks)
    assert first == second
    assert set(first) == {"bn/jeffreys_mean", "bn/jeffreys_max"}
