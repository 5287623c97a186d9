"""Frozen means frozen: bit by bit, whatever optimizers, hooks and users of a real Trainer do."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn import BatchNormFreezer
from lightning_bn.functional import SelectionError, freeze_batch_norm, is_frozen, unfreeze_batch_norm
from tests.callbacks.freezing_fits import (
    BATCHES,
    BODY,
    EPOCHS,
    HEAD,
    FrozenByHand,
    Hooked,
    PretrainedClassifier,
    Watch,
    adamw,
    fit,
    freezer,
    layers,
    loader,
    modes,
    pretrained_net,
    saved,
    sgd,
    state,
    trainer_of,
    values,
)
from tests.models import BatchNormAct2d, BodyAndHead, SharedNorm, fill_statistics, seeded
from tests.versions import warns_of_eval_mode

PUT_BACK = "a frozen value changed and was restored"
MOVED_BY_OTHERS = "changed by other code and restored"


@contextmanager
def held(module: pl.LightningModule, names: tuple[str, ...] = BODY) -> Iterator[None]:
    """What is done inside moves nothing in the named layers, and trains the others."""
    before, other_layers = values(module, names), [name for name in layers(module) if name not in names]
    others = values(module, other_layers)
    yield
    assert values(module, names) == before
    after = values(module, other_layers)
    assert all(after[key] != value for key, value in others.items())


@contextmanager
def noticed() -> Iterator[None]:
    """The freezer says that something moved, when it is found and at the end."""
    with pytest.warns(UserWarning, match=PUT_BACK), pytest.warns(UserWarning, match=MOVED_BY_OTHERS):
        yield


# what an optimizer does


@pytest.mark.parametrize(
    "optimizer",
    [
        sgd,
        adamw,
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
        lambda parameters: torch.optim.Adam(parameters, lr=0.05, amsgrad=True, weight_decay=0.1, foreach=False),
        lambda parameters: torch.optim.AdamW([{"params": [p], "lr": 0.05} for p in parameters], weight_decay=0.1),
    ],
    ids=["momentum and weight decay", "AdamW", "Nesterov", "RMSprop", "Adam", "one group per parameter"],
)
def test_frozen_values_are_bit_identical_under_every_optimizer(optimizer: Any) -> None:
    module, frozen = PretrainedClassifier(optimizer=optimizer), freezer()
    with held(module):
        fit(module, frozen)
    assert frozen.report is not None
    assert frozen.report.identical
    assert frozen.report.layers == BODY


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_moments_gathered_before_a_scheduled_freeze_do_not_move_a_parameter(optimizer: Any) -> None:
    module, at_freeze = PretrainedClassifier(optimizer=optimizer), {}

    def note(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == BATCHES:
            at_freeze.update(values(pl_module, BODY))

    pretrained = values(module, BODY)
    frozen = freezer(start_epoch=1)
    fit(module, Hooked(on_train_batch_start=note), frozen, max_epochs=4)
    assert values(module, BODY) == at_freeze
    assert all(at_freeze[key] != value for key, value in pretrained.items())
    assert frozen.report is not None
    assert frozen.report.identical


class AsIfByHand(FrozenByHand):
    """The training step is that of another module."""

    def __init__(self, base: type[PretrainedClassifier], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._step = base.training_step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self._step(self, batch, batch_idx)


class ManualClassifier(PretrainedClassifier):
    """Two Lightning optimizers, each with half of the layers, stepped by the user."""

    plain = False

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers(use_pl_optimizer=not self.plain):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self._optimizer(self.net.body.parameters()), self._optimizer(self.net.head.parameters())]


class ManuallyClipped(ManualClassifier):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()


class AsIfByHandManual(AsIfByHand):
    def __init__(self, base: type[PretrainedClassifier], **arguments: Any) -> None:
        super().__init__(base, **arguments)
        self.automatic_optimization = False

    configure_optimizers = ManualClassifier.configure_optimizers
    plain = False


@pytest.mark.parametrize(
    ("base", "oracle", "options"),
    [
        pytest.param(PretrainedClassifier, AsIfByHand, {"gradient_clip_val": 0.05}, id="norm"),
        pytest.param(
            PretrainedClassifier,
            AsIfByHand,
            {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
            id="accumulated",
        ),
        pytest.param(
            PretrainedClassifier,
            AsIfByHand,
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
            id="value",
        ),
        pytest.param(ManuallyClipped, AsIfByHandManual, {}, id="manual"),
    ],
)
def test_clipping_sees_the_norm_of_the_gradients_that_are_used(base: Any, oracle: Any, options: dict[str, Any]) -> None:
    module = base()
    fit(module, freezer(), **options)
    expected = oracle(base)
    fit(expected, **options)
    assert state(module) == state(expected)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_frozen_fit_is_bit_identical_to_one_frozen_by_hand(optimizer: Any) -> None:
    module = PretrainedClassifier(optimizer=optimizer)
    fit(module, freezer())
    expected = AsIfByHand(PretrainedClassifier, optimizer=optimizer)
    fit(expected)
    assert state(module) == state(expected)


def test_gradient_accumulation_moves_nothing() -> None:
    module, frozen = PretrainedClassifier(optimizer=adamw), freezer()
    with held(module):
        fit(module, frozen, accumulate_grad_batches=3)
    assert frozen.report is not None
    assert frozen.report.identical
    assert frozen.report.steps == 2 * EPOCHS


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_manual_optimization_with_several_optimizers_moves_nothing(optimizer: Any) -> None:
    module, frozen = ManualClassifier(optimizer=optimizer), freezer()
    with held(module):
        fit(module, frozen)
    assert frozen.report is not None
    assert frozen.report.identical


def test_an_optimizer_stepped_behind_lightnings_back_moves_nothing() -> None:
    module, frozen = ManualClassifier(optimizer=adamw), freezer()
    module.plain = True
    with held(module):
        fit(module, frozen)
    assert frozen.report is not None
    assert frozen.report.identical


def test_a_backward_and_a_step_of_which_lightning_knows_nothing_are_healed_and_reported() -> None:
    class Plain(ManualClassifier):
        plain = True

        def manual_backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
            loss.backward()

    module, frozen = Plain(optimizer=adamw), freezer()
    # Without Lightning's optimizers no step is counted.
    with held(module), noticed():
        fit(module, frozen)
    assert frozen.report is not None
    assert {(one.change.layer, one.change.value) for one in frozen.report.violations} == {
        (name, value) for name in BODY for value in ("weight", "bias")
    }


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)


@pytest.mark.parametrize("interval", [1.0, 1])
def test_an_optimizer_that_moves_parameters_without_gradient_is_healed_and_named(interval: float) -> None:
    # LBFGS keeps a history of directions, those from before the freeze among them.
    module, frozen, seen = PretrainedClassifier(optimizer=lbfgs), freezer(start_epoch=1), []

    def note(trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step >= BATCHES:
            seen.append(values(pl_module, BODY))

    with noticed():
        fit(
            module,
            frozen,
            Hooked(on_train_epoch_start=note, on_validation_batch_start=note),
            val_check_interval=interval,
        )
    assert frozen.report is not None
    assert {one.change.cause for one in frozen.report.violations} == {"LBFGS changes parameters that have no gradient"}
    assert len(seen) > 2
    assert all(one == values(module, BODY) for one in seen)


# what is frozen


@pytest.mark.parametrize(("stats", "affine"), [(True, False), (False, True)])
def test_statistics_and_affine_are_frozen_separately(stats: bool, affine: bool) -> None:
    module, watch = PretrainedClassifier(), Watch()
    fit(module, freezer(stats=stats, affine=affine), watch)
    before, after = values(PretrainedClassifier(), BODY), values(module, BODY)
    frozen = ("running_mean", "running_var", "num_batches_tracked") if stats else ("weight", "bias")
    for key, value in before.items():
        assert (after[key] == value) == key.endswith(frozen), key
    for name in BODY:
        assert all(moved[name] != stats for moved in watch.stats)
        assert all(moved[name] != affine for moved in watch.affine)


class Single(nn.Module):
    """One layer of any kind between its input, three channels, and a classifier."""

    def __init__(self, norm: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.into = nn.Linear(3, 12)
        self.shape = shape
        self.norm = norm
        self.out = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.into(x).unflatten(1, self.shape)).flatten(1))


def initialized_lazy() -> nn.Module:
    layer = nn.LazyBatchNorm2d()
    layer(torch.randn(4, 3, 2, 2))
    return layer


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        pytest.param(lambda: nn.BatchNorm1d(12), (12,), id="1d"),
        pytest.param(lambda: nn.BatchNorm1d(3), (3, 4), id="1d of sequences"),
        pytest.param(lambda: nn.BatchNorm2d(3), (3, 2, 2), id="2d"),
        pytest.param(lambda: nn.BatchNorm3d(3), (3, 2, 2, 1), id="3d"),
        pytest.param(lambda: nn.SyncBatchNorm(3), (3, 2, 2), id="SyncBatchNorm"),
        pytest.param(lambda: BatchNormAct2d(3, nn.SiLU), (3, 2, 2), id="activation inside"),
        pytest.param(initialized_lazy, (3, 2, 2), id="lazy once initialized"),
        pytest.param(lambda: nn.BatchNorm2d(3, momentum=None), (3, 2, 2), id="cumulative"),
        pytest.param(lambda: nn.BatchNorm2d(3, affine=False), (3, 2, 2), id="without affine"),
    ],
)
def test_every_kind_of_batch_norm_is_frozen(build: Any, shape: tuple[int, ...], optimizer: Any) -> None:
    module = PretrainedClassifier(fill_statistics(seeded(lambda: Single(build(), shape))), optimizer)
    kind = type(layers(module)["net.norm"])
    frozen = freezer(modules="norm")
    with held(module, ("net.norm",)):
        fit(module, frozen)
    assert frozen.report is not None
    assert frozen.report.identical
    assert type(layers(module)["net.norm"]) is kind


def test_a_lazy_layer_that_saw_no_batch_is_an_error_that_names_it() -> None:
    module = PretrainedClassifier(Single(nn.LazyBatchNorm2d(), (3, 2, 2)))
    with pytest.raises(SelectionError, match=r"net\.norm.*forward"):
        fit(module, freezer(modules="norm"))


def test_a_layer_without_running_statistics_is_an_error_that_names_it() -> None:
    module = PretrainedClassifier(Single(nn.BatchNorm2d(3, track_running_stats=False), (3, 2, 2)))
    with pytest.raises(SelectionError, match=r"net\.norm.*stats=False"):
        fit(module, freezer(modules="norm"))


def test_affine_of_a_layer_without_running_statistics_is_frozen() -> None:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    module = PretrainedClassifier(fill_statistics(seeded(lambda: Single(norm, (3, 2, 2)))))
    with held(module, ("net.norm",)):
        fit(module, freezer(modules="norm", stats=False))


@pytest.mark.parametrize("path", ["first.norm", "second.norm"])
def test_a_layer_shared_under_two_names_is_frozen_under_either(path: str) -> None:
    shared = fill_statistics(seeded(SharedNorm))
    net = nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (3, 2, 2)), shared, nn.Flatten(), nn.Linear(12, 2))
    module, frozen = PretrainedClassifier(net), freezer(modules=f"2.{path}")
    with held(module, ("net.2.first.norm",)):
        fit(module, frozen)
    assert frozen.report is not None
    assert frozen.report.layers == ("net.2.first.norm",)


def test_only_batch_norm_is_frozen() -> None:
    module = PretrainedClassifier()
    before = state(module)
    fit(module, freezer())
    after = state(module)
    assert all(
        after[key] != value for key, value in before.items() if not key.startswith(BODY) and not key.endswith("tracked")
    )


def test_a_frozen_layer_normalizes_with_its_running_statistics_in_training() -> None:
    normalized: list[tuple[Tensor, Tensor]] = []
    module = PretrainedClassifier()
    layer = layers(module)[BODY[0]]
    layer.register_forward_hook(lambda layer, inputs, output: normalized.append((inputs[0].detach(), output.detach())))
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    fit(module, freezer(), num_sanity_val_steps=0, limit_val_batches=0)
    assert len(normalized) == BATCHES * EPOCHS
    for x, y in normalized:
        expected = (x - mean) / (var + layer.eps).sqrt() * weight + bias
        torch.testing.assert_close(y, expected)


# who sets modes


@pytest.mark.parametrize(
    "hook",
    [
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "training_step",
        "on_before_zero_grad",
        "on_after_backward",
        "on_train_batch_end",
        "on_validation_model_train",
        "on_validation_end",
        "on_train_epoch_end",
    ],
)
def test_train_called_in_any_hook_does_not_thaw_a_layer(hook: str) -> None:
    def train(self: pl.LightningModule, *arguments: Any) -> Any:
        self.train()
        return PretrainedClassifier.training_step(self, *arguments) if hook == "training_step" else None  # type: ignore[arg-type]

    module, frozen = type("Adversary", (PretrainedClassifier,), {hook: train})(), freezer()
    with held(module):
        fit(module, frozen, val_check_interval=2)
    assert frozen.report is not None
    assert frozen.report.identical


def test_train_called_on_the_layer_itself_in_training_step_does_not_thaw_it() -> None:
    class Adversary(PretrainedClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.net.body[1].train()
            self.net.body[4].train(True)
            return super().training_step(batch, batch_idx)

    module, frozen = Adversary(), freezer()
    with held(module):
        fit(module, frozen)
    assert frozen.report is not None
    assert frozen.report.identical


class SetsTheFlag(PretrainedClassifier):
    """Sets the flag itself in every step, which no ``train`` method sees."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for name in BODY:
            layers(self)[name].training = True
        return super().training_step(batch, batch_idx)


def test_a_flag_set_directly_in_training_step_is_healed_and_reported_with_its_cause() -> None:
    module, frozen = SetsTheFlag(), freezer()
    with held(module), noticed():
        fit(module, frozen)
    assert frozen.report is not None
    assert {(one.change.layer, one.change.value) for one in frozen.report.violations} == {
        (name, value) for name in BODY for value in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert {one.change.cause for one in frozen.report.violations} == {"its training flag was set directly"}
    assert {violation.step for violation in frozen.report.violations} == {1}


def test_each_value_that_moves_is_reported_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(SetsTheFlag(), freezer(), max_epochs=3)
    assert sum(PUT_BACK in str(warning.message) for warning in caught) == 1
    assert sum(MOVED_BY_OTHERS in str(warning.message) for warning in caught) == 1


def test_a_layer_whose_flag_is_set_again_and_again_is_guarded_before_its_forward() -> None:
    module, used = SetsTheFlag(), []
    layers(module)[BODY[0]].register_forward_hook(lambda layer, *_: used.append(layer.training))
    with noticed():
        fit(module, freezer(), limit_val_batches=0, num_sanity_val_steps=0)
    assert sum(used) <= 2
    assert len(used) == BATCHES * EPOCHS
    assert not any(used[2:])


def test_validation_in_mid_epoch_thaws_nothing() -> None:
    module, watch, frozen = PretrainedClassifier(), Watch(), freezer()
    with held(module):
        fit(module, watch, frozen, val_check_interval=1)
    assert not any(moved[name] for moved in watch.stats for name in BODY)
    assert frozen.report is not None
    assert frozen.report.identical


def test_the_sanity_check_moves_nothing_and_lightning_does_not_warn_of_modules_in_eval() -> None:
    # Warnings are errors here: freezing before the sanity check would make Lightning count modules in eval mode.
    module, frozen = PretrainedClassifier(), freezer()
    with held(module):
        fit(module, frozen, num_sanity_val_steps=-1)
    assert frozen.report is not None
    assert frozen.report.identical


# who else writes


def add_in_place(layer: _BatchNorm) -> None:
    layer.running_mean.add_(1)


def set_data(layer: _BatchNorm) -> None:
    layer.running_var.data.copy_(layer.running_var.data * 2)


def set_weight_data(layer: _BatchNorm) -> None:
    layer.weight.data.mul_(2)


def replace_buffer(layer: _BatchNorm) -> None:
    layer.running_mean = layer.running_mean + 1


def replace_buffer_by_another_dtype(layer: _BatchNorm) -> None:
    layer.running_var = layer.running_var.double() * 2


def replace_buffer_by_another_shape(layer: _BatchNorm) -> None:
    layer.running_var = layer.running_var.repeat(2)


def take_buffer_away(layer: _BatchNorm) -> None:
    layer.running_mean = None


def load_other_values(layer: _BatchNorm) -> None:
    layer.load_state_dict({key: value + 1 for key, value in layer.state_dict().items()})


def reset(layer: _BatchNorm) -> None:
    layer.reset_running_stats()


def write_nan(layer: _BatchNorm) -> None:
    layer.running_var.fill_(float("nan"))


WRITERS = {
    add_in_place: {"running_mean"},
    set_data: {"running_var"},
    set_weight_data: {"weight"},
    replace_buffer: {"running_mean"},
    replace_buffer_by_another_dtype: {"running_var"},
    replace_buffer_by_another_shape: {"running_var"},
    take_buffer_away: {"running_mean"},
    load_other_values: {"running_mean", "running_var", "num_batches_tracked", "weight", "bias"},
    reset: {"running_mean", "running_var", "num_batches_tracked"},
    write_nan: {"running_var"},
}
named = pytest.mark.parametrize("write", list(WRITERS), ids=lambda write: write.__name__)


def writing(
    write: Callable[[_BatchNorm], None], at_step: int, hook: str = "on_train_batch_end"
) -> PretrainedClassifier:
    """A module that writes to a frozen layer once, in one of its hooks, which run after those of all callbacks."""

    def act(self: pl.LightningModule, *arguments: Any) -> None:
        if self.global_step == at_step:
            write(layers(self)[BODY[0]])

    return type("Writing", (PretrainedClassifier,), {hook: act})()


@named
@pytest.mark.parametrize("at_step", [2, EPOCHS * BATCHES], ids=["in mid-epoch", "in the last step"])
def test_whatever_is_written_to_a_frozen_layer_is_put_back_and_reported(write: Any, at_step: int) -> None:
    module, frozen = writing(write, at_step), freezer()
    before = values(module, BODY)
    with noticed():
        fit(module, frozen)
    assert values(module, BODY) == before
    assert frozen.report is not None
    assert not frozen.report.identical
    violations = frozen.report.violations
    assert {(one.change.layer, one.change.value) for one in violations} == {
        (BODY[0], value) for value in WRITERS[write]
    }
    # Found at the next batch, or at the end of the epoch where the writer left no version behind.
    latest = at_step + (BATCHES if write in (set_data, set_weight_data) else 1)
    assert all(at_step <= violation.step <= latest for violation in violations)


@named
def test_a_written_value_does_not_reach_validation(write: Any) -> None:
    module, seen = writing(write, BATCHES), []
    frozen = freezer()
    with noticed():
        fit(module, frozen, Hooked(on_validation_batch_start=lambda *a: seen.append(values(a[1], BODY))))
    expected = values(PretrainedClassifier(), BODY)
    assert len(seen) > EPOCHS
    assert all(one == expected for one in seen)


@pytest.mark.parametrize(
    ("write", "every", "save_weights_only"),
    [
        pytest.param(write, every, save_weights_only, id=f"{write.__name__}-{next(iter(every))}-{save_weights_only}")
        for write in (add_in_place, set_data, replace_buffer)
        for every in ({"every_n_train_steps": 1}, {"every_n_epochs": 1})
        for save_weights_only in (False, True)
        # Lightning tells no callback of a file of weights only, and `tensor.data` leaves no version behind.
        if not (save_weights_only and write is set_data and "every_n_train_steps" in every)
    ],
)
def test_a_written_value_does_not_reach_a_checkpoint(
    write: Any, every: dict[str, int], save_weights_only: bool, tmp_path: Path
) -> None:
    class Writing(PretrainedClassifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step in (1, 2 * BATCHES - 1):
                write(layers(self)[BODY[0]])

    module = Writing()
    expected = values(module, BODY)
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_weights_only=save_weights_only, **every)
    with noticed():
        fit(module, freezer(), keep)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == (EPOCHS * BATCHES if "every_n_train_steps" in every else EPOCHS)
    for file in files:
        assert saved(torch.load(file, weights_only=True)["state_dict"]) == expected, file.name


@pytest.mark.parametrize("write", [add_in_place, set_data, replace_buffer], ids=lambda write: write.__name__)
def test_a_value_written_in_the_last_step_of_an_epoch_without_validation_does_not_reach_its_checkpoint(
    write: Any, tmp_path: Path
) -> None:
    module = writing(write, BATCHES)
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_weights_only=True)
    with noticed():
        fit(module, freezer(), keep, limit_val_batches=0)
    checkpoint = torch.load(tmp_path / f"step={BATCHES}.ckpt", weights_only=True)
    assert saved(checkpoint["state_dict"]) == values(PretrainedClassifier(), BODY)


@pytest.mark.parametrize("write", [add_in_place, set_data, replace_buffer], ids=lambda write: write.__name__)
def test_what_is_written_in_validation_does_not_reach_the_training_after_it(write: Any) -> None:
    module, seen = writing(write, 2, "on_validation_epoch_end"), []
    with noticed():
        fit(
            module,
            freezer(),
            Hooked(on_train_batch_start=lambda *a: seen.append(values(a[1], BODY))),
            val_check_interval=2,
        )
    assert len(seen) == EPOCHS * BATCHES
    assert all(one == values(PretrainedClassifier(), BODY) for one in seen)


def test_a_value_moved_by_a_hair_and_back_again_is_not_reported() -> None:
    def there_and_back(layer: _BatchNorm) -> None:
        layer.running_mean.copy_(layer.running_mean.clone())

    frozen = freezer()
    fit(writing(there_and_back, 1), frozen)
    assert frozen.report is not None
    assert frozen.report.identical


def test_finetuning_of_lightning_beside_it_moves_nothing() -> None:
    class Finetuning(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net.body, train_bn=False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net.body, optimizer, lr=0.05)

    class OverWhatTrains(PretrainedClassifier):
        def configure_optimizers(self) -> Any:
            return sgd(p for p in self.parameters() if p.requires_grad)

    module, frozen = OverWhatTrains(), freezer()
    before = values(module, BODY)
    fit(module, Finetuning(), frozen, max_epochs=3)
    assert values(module, BODY) == before
    assert frozen.report is not None
    assert frozen.report.identical


# an explicit way in


def test_values_given_inside_allow_updates_are_the_frozen_ones_afterwards() -> None:
    frozen = freezer()

    class Updating(PretrainedClassifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                with frozen.allow_updates():
                    assert not is_frozen(layers(self)[BODY[0]])
                    layers(self)[BODY[0]].running_mean.fill_(3.0)

    module, watch = Updating(), Watch()
    fit(module, watch, frozen, max_epochs=3)
    assert torch.equal(layers(module)[BODY[0]].running_mean, torch.full((4,), 3.0))
    assert not any(moved[name] for moved in [*watch.stats, *watch.affine] for name in BODY)
    assert frozen.report is not None
    assert frozen.report.identical
    assert frozen.report.steps == 3 * BATCHES


def test_a_layer_in_allow_updates_trains_and_afterwards_is_frozen_at_once() -> None:
    frozen = freezer()

    class Updating(PretrainedClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 2:
                with frozen.allow_updates():
                    self.loss(batch)
            return self.loss(batch)

    module = Updating()
    fit(module, frozen)
    # One forward in train mode, whatever came before and after it.
    assert [int(layers(module)[name].num_batches_tracked) for name in BODY] == [8, 8]
    assert frozen.report is not None
    assert frozen.report.identical


def test_allow_updates_is_harmless_outside_a_fit_and_where_the_freeze_is_off() -> None:
    frozen = freezer(start_epoch=1)
    module = PretrainedClassifier()
    with frozen.allow_updates():
        pass

    def update(trainer: Any, pl_module: Any) -> None:
        with frozen.allow_updates():
            pass

    watch = Watch()
    fit(module, watch, Hooked(on_train_epoch_start=update), frozen)
    with frozen.allow_updates():
        pass
    expected = [True] * BATCHES + [False] * BATCHES
    assert [moved[BODY[0]] for moved in watch.stats] == expected


# where the network comes from


def test_layers_built_in_configure_model_are_frozen() -> None:
    class Late(PretrainedClassifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity())

        def configure_model(self) -> None:
            if isinstance(self.net, nn.Identity):
                self.net = pretrained_net()

    module, frozen = Late(), freezer()
    fit(module, frozen)
    assert values(module, BODY) == values(PretrainedClassifier(), BODY)
    assert values(module, [HEAD]) != values(PretrainedClassifier(), [HEAD])
    assert frozen.report is not None
    assert frozen.report.identical


def test_layers_of_a_compiled_backbone_are_frozen_under_their_plain_names() -> None:
    class Compiled(PretrainedClassifier):
        def on_train_epoch_start(self) -> None:
            self.train()

    net = pretrained_net()
    net.body = torch.compile(net.body, backend="eager")  # type: ignore[assignment]
    module, frozen = Compiled(net, adamw), freezer(start_epoch=1)
    at_freeze: dict[str, bytes] = {}

    def note(trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            at_freeze.update(values(pl_module, BODY))

    fit(module, Hooked(on_train_epoch_start=note), frozen, max_epochs=3)
    assert values(module, BODY) == at_freeze
    assert values(PretrainedClassifier(), BODY) != at_freeze
    assert frozen.report is not None
    assert frozen.report.identical
    assert frozen.report.layers == BODY


def test_weights_loaded_in_the_modules_own_on_train_start_are_the_frozen_ones() -> None:
    class Loading(PretrainedClassifier):
        def on_train_start(self) -> None:
            self.net.load_state_dict(loaded)

    loaded = fill_statistics(seeded(BodyAndHead), seed=5).state_dict()
    module, frozen = Loading(), freezer()
    fit(module, frozen)
    assert values(module, BODY) == values(PretrainedClassifier(fill_statistics(seeded(BodyAndHead), seed=5)), BODY)
    assert frozen.report is not None
    assert frozen.report.identical


def test_statistics_that_are_still_those_of_construction_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"with their initial running statistics.*'net\.body\.1'"):
        fit(PretrainedClassifier(seeded(BodyAndHead)), freezer())


def test_a_selection_that_means_no_layer_is_an_error_before_training() -> None:
    module = PretrainedClassifier()
    before = state(module)
    with pytest.raises(SelectionError, match=r"bodi.*Closest.*'body'"):
        fit(module, freezer(modules="bodi"))
    assert state(module) == before


# given back


@pytest.mark.parametrize("interval", [1.0, 2])
@pytest.mark.parametrize("found", [True, False], ids=["found in train", "found in eval"])
def test_modes_classes_and_flags_are_given_back_when_the_fit_ends(found: bool, interval: float) -> None:
    module = PretrainedClassifier()
    for name in BODY:
        layers(module)[name].train(found)
    before = modes(module)
    attributes = {name: set(vars(layer)) for name, layer in layers(module).items()}
    with nullcontext() if found else warns_of_eval_mode():
        fit(module, freezer(), val_check_interval=interval)
    assert modes(module) == before
    assert {type(layer) for layer in layers(module).values()} == {nn.BatchNorm1d}
    assert {name: set(vars(layer)) for name, layer in layers(module).items()} == attributes
    assert not any(layer._forward_pre_hooks for layer in layers(module).values())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_hooks_of_the_stronger_guard_are_gone_when_the_fit_ends() -> None:
    module = SetsTheFlag()
    with noticed():
        fit(module, freezer())
    assert not any(layer._forward_pre_hooks for layer in layers(module).values())


@pytest.mark.parametrize("found", [True, False], ids=["found in train", "found in eval"])
@pytest.mark.parametrize("where", ["training_step", "validation_step", "on_train_epoch_end", "on_train_batch_start"])
def test_modes_of_the_frozen_layers_are_given_back_after_an_exception(where: str, found: bool) -> None:
    def fail(self: pl.LightningModule, *arguments: Any) -> None:
        if self.global_step:
            raise RuntimeError("as planned")
        return PretrainedClassifier.training_step(self, *arguments) if where == "training_step" else None  # type: ignore[arg-type]

    module = type("Failing", (PretrainedClassifier,), {where: fail})()
    for name in BODY:
        layers(module)[name].train(found)
    before = values(module, BODY)
    with pytest.raises(RuntimeError, match="as planned"), nullcontext() if found else warns_of_eval_mode():
        fit(module, freezer())
    assert [layers(module)[name].training for name in BODY] == [found, found]
    assert {type(layer) for layer in layers(module).values()} == {nn.BatchNorm1d}
    assert not any(is_frozen(layer) for layer in layers(module).values())
    assert values(module, BODY) == before


def test_a_keyboard_interrupt_gives_the_layers_back_too() -> None:
    class Interrupted(PretrainedClassifier):
        def on_train_epoch_end(self) -> None:
            raise KeyboardInterrupt

    module = Interrupted()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(module, freezer())
    assert all(layer.training for layer in layers(module).values())
    assert not any(is_frozen(layer) for layer in layers(module).values())


@pytest.mark.parametrize("fails", [False, True])
def test_a_later_trainer_without_a_freezer_trains_the_layers(fails: bool) -> None:
    class Failing(PretrainedClassifier):
        fails = False

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.fails and self.global_step:
                raise RuntimeError("as planned")

    module = Failing()
    module.fails = fails
    with pytest.raises(RuntimeError, match="as planned") if fails else nullcontext():
        fit(module, freezer())
    module.fails = False
    module.train()
    before = values(module)
    fit(module)
    assert all(values(module)[key] != value for key, value in before.items())


def test_a_trainer_that_fits_twice_freezes_twice() -> None:
    module, frozen = PretrainedClassifier(), freezer()
    trainer = fit(module, frozen)
    first = frozen.report
    trainer.fit_loop.max_epochs = 2 * EPOCHS
    other = values(module, [HEAD])
    with held(module):
        trainer.fit(module, loader(), loader(16, seed=1))
    assert values(module, [HEAD]) != other
    assert frozen.report is not None
    assert frozen.report is not first
    assert frozen.report.identical
    assert modes(module) == modes(PretrainedClassifier())


def test_what_the_ground_floor_froze_stays_frozen_after_the_fit() -> None:
    module = PretrainedClassifier()
    freeze_batch_norm(module, "net.body.1")
    with warns_of_eval_mode():
        fit(module, freezer())
    assert is_frozen(layers(module)[BODY[0]])
    assert not is_frozen(layers(module)[BODY[1]])
    assert not layers(module)[BODY[0]].train().training
    unfreeze_batch_norm(module)
    assert layers(module)[BODY[0]].training


def test_the_gradients_that_are_there_when_a_freeze_begins_are_dropped() -> None:
    module, seen = PretrainedClassifier(), {}

    def note(trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        seen[trainer.global_step] = [p.grad is None for name in BODY for p in layers(pl_module)[name].parameters()]

    fit(module, freezer(start_step=3), Hooked(on_train_batch_start=note))
    assert not any(seen[2])
    assert all(seen[3])


def test_the_parameters_stay_in_their_optimizer_group_and_are_the_same_objects() -> None:
    module = PretrainedClassifier(optimizer=adamw)
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    trainer = fit(module, freezer())
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == before
    grouped = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert grouped == set(before.values())


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}, {"limit_val_batches": 0}])
def test_the_shorter_ways_through_a_trainer_freeze_as_well(options: dict[str, Any]) -> None:
    module, frozen = PretrainedClassifier(), freezer()
    if "barebones" in options:
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[frozen], barebones=True)
        with held(module):
            trainer.fit(module, loader(), loader(16))
    else:
        with held(module):
            fit(module, frozen, **options)
    assert frozen.report is not None
    assert frozen.report.identical


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_frozen_values_are_bit_identical_in_half_precision(precision: str) -> None:
    module, frozen, first = PretrainedClassifier(optimizer=adamw), freezer(), {}

    def note(trainer: Any, pl_module: Any) -> None:
        first.update(values(pl_module, BODY))

    fit(module, Hooked(on_train_start=note), frozen, precision=precision)
    assert values(module, BODY) == first
    assert frozen.report is not None
    assert frozen.report.identical


def test_nothing_to_freeze_is_refused() -> None:
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException, match="freezes nothing"):
        BatchNormFreezer(stats=False, affine=False)


def test_all_arguments_after_the_modules_have_to_be_named() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        BatchNormFreezer("net", "net.head")  # type: ignore[misc]


def test_validate_and_test_without_a_fit_leave_the_layers_alone() -> None:
    module, frozen = PretrainedClassifier(), freezer()
    before = state(module)
    trainer = trainer_of(frozen)
    trainer.validate(module, loader(), verbose=False)
    assert state(module) == before
    assert modes(module) == modes(PretrainedClassifier())
    assert frozen.report is None


def test_names_with_the_letters_of_patterns_are_frozen_through_the_sanity_check() -> None:
    module = PretrainedClassifier()
    module.extra = nn.ModuleDict({"cam[0]*": fill_statistics(nn.BatchNorm1d(4))})
    frozen = freezer(modules=None, root="")
    fit(module, frozen, num_sanity_val_steps=1)
    assert "extra.cam[0]*" in frozen.report.layers
