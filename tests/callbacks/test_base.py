"""What all callbacks have in common: arguments that are looked at when they are made, and names."""

import inspect
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_bn import BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm
from lightning_bn.functional import SelectionError, batch_norm_layers, freeze_batch_norm, recalibrate
from tests.callbacks.fits import LAYERS, Classifier, quiet, train_loader, val_loader
from tests.models import fill_statistics
from tests.pages import callbacks_of

CALLBACKS = ["BatchNormFreezer", "BatchNormMonitor", "PreciseBatchNorm"]


def configured(name: str, line: str, folder: Path) -> Any:
    text = f"trainer:\n  callbacks:\n    - class_path: lightning_bn.{name}\n      init_args:\n        {line}\n"
    return callbacks_of(text, folder, pl)[0]


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("empty", ["[]", "''", "[a, '']"])
def test_empty_list_or_string_is_refused_by_name_before_training(name: str, empty: str, tmp_path: Path) -> None:
    # As all that is wrong in a file of LightningCLI: before anything is built.
    with pytest.raises((ValueError, ArgumentError), match="modules"):
        configured(name, f"modules: {empty}", tmp_path)


@pytest.mark.parametrize("line", ["modules:", "modules: null", "exclude:", "root: ''"])
def test_line_without_a_value_is_as_if_it_were_not_there(line: str, tmp_path: Path) -> None:
    # LightningCLI hands both on as None, and writes "modules: null" itself into the configuration that it saves.
    plan = configured("BatchNormFreezer", line, tmp_path).plan(Classifier())
    assert [layer.name for layer in plan.layers] == list(LAYERS)
    assert f"by every layer: {len(LAYERS)}" in str(plan)


KINDS: list[Any] = [None, True, False, 1, 0, -1, 2.5, float("nan"), "a", "", [], ["a"], [1], {}, {"a": 1}, {"a": ["b"]}]
KINDS += [object(), b"x", (1, 2), Path("nowhere")]
ARGUMENTS = [
    (kind, name)
    for kind in (BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm)
    for name in inspect.signature(kind).parameters
]


def refusal(build: Callable[[], Any]) -> str:
    """What a misconfiguration is told; empty for what is taken."""
    try:
        build()
    except (MisconfigurationException, SelectionError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("kind", "name"), ARGUMENTS, ids=[f"{kind.__name__}-{name}" for kind, name in ARGUMENTS])
def test_argument_is_taken_as_what_it_is_or_refused_by_its_name(kind: Any, name: str) -> None:
    arguments = {"by_task": {"a": ["b"]}} if name == "task_key" else {}
    taken = []
    for value in KINDS:
        refused = refusal(lambda value=value: kind(**{**arguments, name: value}))  # type: ignore[misc]
        assert name in refused or not refused
        taken += [] if refused else [value]
    annotation = inspect.signature(kind).parameters[name].annotation
    words = {"bool": bool, "int": int, "float": (int, float), "str": str, "Sequence": list, "dict": dict}
    allowed = tuple(of for word, of in words.items() if word in annotation)
    if "None" in annotation:
        allowed += (type(None),)
    for value in taken:
        assert isinstance(value, allowed), value  # type: ignore[arg-type]
        assert isinstance(value, bool) <= ("bool" in annotation), value


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "modules": lambda value: batch_norm_layers(nn.BatchNorm1d(2), value),
    "root": lambda value: batch_norm_layers(nn.BatchNorm1d(2), root=value),
    "stats": lambda value: freeze_batch_norm(fill_statistics(nn.BatchNorm1d(2)), stats=value),
    "affine": lambda value: freeze_batch_norm(fill_statistics(nn.BatchNorm1d(2)), affine=value),
    "num_batches": lambda value: recalibrate(nn.BatchNorm1d(2), [torch.randn(8, 2)], num_batches=value),
    "max_standard_error": lambda value: recalibrate(nn.BatchNorm1d(2), [torch.randn(8, 2)], max_standard_error=value),
    "prior": lambda value: recalibrate(nn.BatchNorm1d(2), [torch.randn(8, 2)], prior=value),
    "containers_in_eval": lambda value: recalibrate(nn.BatchNorm1d(2), [torch.randn(8, 2)], containers_in_eval=value),
    "estimator": lambda value: recalibrate(nn.BatchNorm1d(2), [torch.randn(8, 2)], estimator=value),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("value", [object(), b"x", {"a": 1}, [1], float("nan")])
def test_functions_refuse_what_they_cannot_take_by_its_name(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        FUNCTIONS[name](value)


@pytest.mark.parametrize("kind", [BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm])
@pytest.mark.parametrize("name", [None, "same"])
@pytest.mark.parametrize("where", ["the Trainer's list", "configure_callbacks"])
def test_two_of_one_name_are_told_to_take_names_of_their_own(kind: Any, name: str | None, where: str) -> None:
    def one() -> Any:
        return kind(**({"modules": "net.bn"} if kind is BatchNormFreezer else {}), name=name)

    class Configures(Classifier):
        def configure_callbacks(self) -> Any:
            return [one(), one()] if where == "configure_callbacks" else []

    callbacks = [] if where == "configure_callbacks" else [one(), one()]
    with pytest.raises(
        MisconfigurationException,
        match=f"two {kind.__name__} callbacks have the name {name!r}: give each a different name=",
    ):
        quiet(callbacks=callbacks).fit(Configures(), train_loader(), val_loader())


def test_two_of_different_names_have_states_of_their_own() -> None:
    callbacks = [PreciseBatchNorm(num_batches=1, name=name) for name in ("a", "b")]
    trainer = quiet(callbacks=callbacks, max_epochs=1)
    trainer.fit(Classifier(), train_loader(), val_loader())
    assert {"PreciseBatchNorm[a]", "PreciseBatchNorm[b]"} <= set(
        trainer._checkpoint_connector.dump_checkpoint()["callbacks"]
    )
