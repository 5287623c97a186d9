"""Models, contexts and fits that are not plain: frozen as promised, or refused by name, and never the end of a fit."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import lightning_bn
from lightning_bn import BatchNormFreezer
from lightning_bn.functional import FreezeSession, RecomputationError, SelectionError, frozen_batch_norm, plan
from lightning_bn.functional.freezing.session import CHECK_EVERY
from tests.averages import EMAWeightAveraging
from tests.callbacks.freezing_fits import (
    BODY,
    PretrainedClassifier,
    fit,
    freezer,
    layers,
    loader,
    modes,
    pretrained_net,
    said,
    state,
    trainer_of,
    values,
)
from tests.models import FrozenBatchNorm2d, bits, fill_statistics

# Activation checkpointing runs forwards again in the backward, after a context has ended


class Checkpointed(PretrainedClassifier):
    """The body is run again in the backward."""

    reentrant = False

    def loss(self, batch: Any) -> Tensor:
        body = checkpoint(self.net.body, batch[0].requires_grad_(), use_reentrant=self.reentrant)  # type: ignore
        return F.cross_entropy(self.net.head(body), batch[1])  # type: ignore

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with lightning_bn.task("det"):
            return self.loss(batch)


class Reentrant(Checkpointed):
    reentrant = True


class Labelled(Checkpointed):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


class BackwardInside(Checkpointed):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        with lightning_bn.task("det"):
            self.manual_backward(self.loss(batch))
        optimizer.step()


def task_of_all(batch: Any, batch_idx: int) -> str:
    return "det"


def by_task(**arguments: Any) -> BatchNormFreezer:
    return BatchNormFreezer(by_task={"det": ["body"]}, root="net", **arguments)


@pytest.mark.parametrize("kind", [Checkpointed, Reentrant])
@pytest.mark.parametrize("stats", [True, False])
def test_forward_run_again_after_its_context_is_an_error_and_nothing_moved(kind: Any, stats: bool) -> None:
    module = kind()
    before = values(module, BODY)
    with pytest.raises(
        RecomputationError, match=r"'net\.body\.1'.*task 'det'.*Call the backward inside the context, or"
    ):
        fit(module, by_task(stats=stats))
    if stats:
        assert values(module, BODY) == before
    assert not any(layer._forward_pre_hooks for layer in layers(module).values())


@pytest.mark.parametrize(
    ("kind", "key"),
    [(Labelled, f"{__name__}.task_of_all"), (BackwardInside, None)],
    ids=["labelled", "backward inside"],
)
def test_forward_run_again_while_it_is_frozen_moves_nothing(kind: Any, key: str | None) -> None:
    module = kind()
    before = values(module, BODY)
    holder = by_task(task_key=key)
    fit(module, holder)
    assert values(module, BODY) == before
    assert holder.report is not None
    assert holder.report.identical


def test_proof_of_a_block_tells_of_a_backward_after_it() -> None:
    net = pretrained_net().train()
    x = torch.randn(8, 3, requires_grad=True)
    with frozen_batch_norm(net, "body") as proof:
        inside = checkpoint(net.body, x, use_reentrant=False).sum()
        assert str(proof) == "2 frozen layers bit-identical"
        inside.backward()
    assert proof.identical
    with frozen_batch_norm(net, "body") as proof:
        after = checkpoint(net.body, x, use_reentrant=True).sum()
    assert tuple(proof) == ("body.1", "body.4")
    after.backward()
    assert not proof.identical
    assert str(proof).startswith("2 frozen layers; changed: body.1 (running_mean by up to")


# What has running statistics and is not torch's BatchNorm


class ActivatedBatchNorm(nn.Module):
    """Written by hand, as in-place activated BatchNorm is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(F.batch_norm(x, self.running_mean, self.running_var, training=self.training))  # type: ignore


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def scripted() -> nn.Module:
    return torch.jit.script(nn.BatchNorm1d(4))  # type: ignore[no-any-return]


LOOKALIKES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "by hand": (lambda: ActivatedBatchNorm(4), "ActivatedBatchNorm"),
    "instance norm": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), "InstanceNorm1d"),
    "in TorchScript": (scripted, "BatchNorm1d"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("which", LOOKALIKES)
def test_what_looks_like_batch_norm_is_named_in_the_plan_and_the_report(which: str) -> None:
    build, kind = LOOKALIKES[which]
    net = fill_statistics(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), build())).train()
    described = str(plan(net))
    assert described.endswith(f"not frozen, since they are not torch's BatchNorm: '2' ({kind})")
    assert "not torch's" not in str(plan(net, exclude="2"))
    session = FreezeSession(net, lightning_bn.functional.FreezeSelection())
    session.switch(True, 0)
    session.start_batch(0)
    session.end_batch(1)
    assert (
        str(session.close(1))
        == "1 frozen layer bit-identical over 1 step; not frozen, since they are not torch's BatchNorm: '2'"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("which", LOOKALIKES)
def test_errors_about_no_batch_norm_name_them(which: str) -> None:
    build, kind = LOOKALIKES[which]
    with pytest.raises(SelectionError, match=rf"of another kind: '1' \({kind}\)"):
        plan(nn.Sequential(nn.Linear(3, 4), build()))
    with pytest.raises(SelectionError, match=rf"of another kind, which lightning_bn cannot freeze.*'1\.0' \({kind}\)"):
        plan(nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(build())), "1")


def test_backbone_that_is_frozen_by_its_kind_is_told_so() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(FrozenBatchNorm2d(3), FrozenBatchNorm2d(3)))
    with pytest.raises(SelectionError, match=r"every layer of '1' is a FrozenBatchNorm2d \(2\)"):
        plan(net, "1")
    assert "not torch's" not in str(plan(net))


# Writers that leave no version, and values that moved between two runs


def test_batch_norm_called_on_a_frozen_layers_buffers_is_found_within_the_bound() -> None:
    net = pretrained_net().train()
    session = FreezeSession(net, lightning_bn.functional.FreezeSelection("body"))
    session.switch(True, 0)
    layer: Any = net.body[1]

    def run() -> None:
        for step in range(CHECK_EVERY + 1):
            session.start_batch(step)
            if step == 0:
                F.batch_norm(torch.randn(8, 4), layer.running_mean, layer.running_var, training=True)
            session.end_batch(step + 1)

    with pytest.warns(UserWarning, match="changed and was restored"):
        run()
    report = session.close(CHECK_EVERY + 1)
    assert {one.change.value for one in report.violations} == {"running_mean", "running_var"}
    assert all((one.step or 0) <= CHECK_EVERY for one in report.violations)


class Shifted(PretrainedClassifier):
    shift: tuple[str, float] = ("running_mean", 0.0)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        key, value = self.shift
        checkpoint["state_dict"][f"{BODY[0]}.{key}"] += value


@pytest.mark.parametrize("key", ["running_mean", "running_var", "weight", None])
def test_values_that_moved_between_two_runs_are_told_of(tmp_path: Any, key: str | None) -> None:
    fit(PretrainedClassifier(), freezer(), ModelCheckpoint(dirpath=tmp_path, filename="one"), max_epochs=1)
    module, holder = Shifted(), freezer()
    if key is None:
        fit(module, holder, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
        assert holder.report is not None
        assert holder.report.identical
        return
    module.shift = (key, 5.0)
    told = rf"{BODY[0]} \(values \(other values were frozen when the checkpoint was saved\)\)"
    with pytest.warns(UserWarning, match=told):
        fit(module, holder, ckpt_path=tmp_path / "one.ckpt", max_epochs=2)
    assert holder.report is not None
    assert not holder.report.identical


def test_older_checkpoints_have_no_digest_and_are_read(tmp_path: Any) -> None:
    fit(PretrainedClassifier(), freezer(), ModelCheckpoint(dirpath=tmp_path, filename="one"), max_epochs=1)
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert set(saved["callbacks"]["BatchNormFreezer"]["report"].pop("digests")) == set(BODY)
    del saved["callbacks"]["BatchNormFreezer"]["report"]["others"]
    torch.save(saved, tmp_path / "old.ckpt")
    holder = freezer()
    fit(PretrainedClassifier(), holder, ckpt_path=tmp_path / "old.ckpt", max_epochs=2)
    assert holder.report is not None
    assert holder.report.identical
    assert holder.report.steps == 8


# Layers that are replaced or taken away


class Replaces(PretrainedClassifier):
    """Puts another layer in the place of a frozen one, in one of the module's hooks."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook, self.old = hook, self.net.body[1]  # type: ignore[index]
        # In a list: no submodule.
        self.removed = [self.old]
        del self.old

    def replace(self) -> None:
        new = fill_statistics(nn.BatchNorm1d(4), seed=9).train()
        self.given = bits(new.running_mean)  # type: ignore
        self.net.body[1] = new  # type: ignore[index]

    def on_train_start(self) -> None:
        if self.hook == "start":
            self.replace()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.hook == "batch" and self.trainer.global_step == 2:
            self.replace()

    def on_validation_start(self) -> None:
        if self.hook == "validation" and self.trainer.global_step == 4:
            self.replace()


@pytest.mark.parametrize("hook", ["start", "batch", "validation"])
def test_replaced_layers_go_back_to_training_and_nobody_stays_in_eval(hook: str) -> None:
    module, holder = Replaces(hook), freezer()
    if hook == "start":
        fit(module, holder)
        # What the module's own hook gave it is what is kept.
        assert bits(layers(module)[BODY[0]].running_mean) == module.given  # type: ignore[arg-type]
        assert holder.report is not None
        assert holder.report.identical
    else:
        with pytest.warns(UserWarning, match="replaced by another layer"):
            fit(module, holder)
    assert all(layer.training for layer in [*layers(module).values(), *module.removed])
    assert not any(lightning_bn.functional.is_frozen(layer) for layer in [*layers(module).values(), *module.removed])
    fit(module)
    assert all(modes(module).values())


class Shrinks(PretrainedClassifier):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net.body[4] = nn.Identity()  # type: ignore[index]


@pytest.mark.parametrize("averaging", [False, True])
def test_layer_taken_out_of_the_model_in_mid_fit_ends_nothing(averaging: bool) -> None:
    module, holder = Shrinks(), freezer()
    if averaging:
        with pytest.raises(Exception, match=r".") as caught:
            fit(module, EMAWeightAveraging(decay=0.5), max_epochs=3)
        with pytest.raises(type(caught.value)):
            fit(Shrinks(), holder, EMAWeightAveraging(decay=0.5), max_epochs=3)
        return
    fit(module, holder, max_epochs=3)
    assert holder.report is not None
    assert holder.report.identical


# Pruning and TorchScript beside it


def pruning() -> ModelPruning:
    return ModelPruning("l1_unstructured", amount=0.5, apply_pruning=lambda epoch: epoch == 1, verbose=0)


def test_pruning_beside_the_freezer_fits_as_without_it() -> None:
    module, holder = PretrainedClassifier(), freezer(affine=False)
    fit(module, holder, pruning(), max_epochs=3)
    assert holder.report is not None
    assert holder.report.identical
    module, holder = PretrainedClassifier(), freezer()
    before = [layers(module)[name].bias.clone() for name in BODY]
    fit(module, holder, pruning(), max_epochs=3)
    assert holder.report is not None
    assert holder.report.identical
    # Moved by no training, and in part masked.
    after = [layers(module)[name].bias for name in BODY]
    assert all(bool(((now == then) | (now == 0)).all()) for now, then in zip(after, before, strict=True))
    assert any(bool((now == 0).any()) for now in after)


def test_layer_pruned_before_the_fit_is_frozen_in_what_it_was_pruned_from() -> None:
    module = PretrainedClassifier()
    layer = layers(module)[BODY[0]]
    prune.l1_unstructured(layer, "weight", amount=0.5)
    before = bits(layer.weight_orig)  # type: ignore[arg-type]
    holder = freezer()
    fit(module, holder)
    assert bits(layer.weight_orig) == before  # type: ignore[arg-type]
    assert holder.report is not None
    assert holder.report.identical


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("where", ["beside", "around"])
def test_torchscript_anywhere_in_the_model_is_no_failure(where: str) -> None:
    module = PretrainedClassifier()
    if where == "beside":
        module.net.head[3] = torch.jit.script(nn.Linear(4, 2))  # type: ignore[index]
    else:
        module.net.head = torch.jit.script(module.net.head.eval()).train()  # type: ignore
    before, holder = values(module, BODY), freezer()
    fit(module, holder)
    assert values(module, BODY) == before
    assert holder.report is not None
    assert holder.report.identical


# Outside of a fit


HOOKS = [name for name in dir(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown", "state_dict")]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_are_called_by_hand_outside_of_a_fit_do_no_harm(hook: str) -> None:
    module, holder = PretrainedClassifier(), freezer()
    trainer = trainer_of(holder)
    given: dict[str, Any] = {
        "trainer": trainer,
        "pl_module": module,
        "stage": "fit",
        "batch": next(iter(loader())),
        "outputs": {"loss": torch.zeros(())},
        "exception": ValueError(),
        "checkpoint": {"callbacks": {type(holder): {}}},
        "loss": torch.zeros(()),
    }
    parameters = list(inspect.signature(getattr(pl.Callback, hook)).parameters)[1:]
    before = state(module)
    with said():
        getattr(holder, hook)(*(given.get(name, 0) for name in parameters))
    assert state(module) == before


class ReplacesOfTask(Labelled):
    def loss(self, batch: Any) -> Tensor:
        return PretrainedClassifier.loss(self, batch)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net.body[1] = fill_statistics(nn.BatchNorm1d(4), seed=9).train()  # type: ignore[index]


def test_replaced_layer_of_a_task_is_told_of_and_frozen_from_the_next_full_check_on() -> None:
    module, holder = ReplacesOfTask(), by_task(task_key=f"{__name__}.task_of_all")
    with pytest.warns(UserWarning, match="replaced by another layer"):
        fit(module, holder, max_epochs=3)
    assert holder.report is not None
    assert not holder.report.identical
    # Epoch 1 passed before it was seen, epoch 2 did not move it.
    assert int(layers(module)[BODY[0]].num_batches_tracked) <= 7 + 4  # type: ignore[arg-type]
    assert not any(layer._forward_pre_hooks for layer in layers(module).values())
