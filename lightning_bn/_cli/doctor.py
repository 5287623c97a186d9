"""``lightning-bn doctor``: mistakes with BatchNorm in a model or a training configuration, before it is run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_bn._cli.common import FOUND, HEALTHY, NO, add_json, add_parser_to, as_json
from lightning_bn._cli.doctor_in_words import report
from lightning_bn._cli.users_code import UsersCodeError, configured, imported, in_words, quiet
from lightning_bn._cli.wrapping import console_width

if TYPE_CHECKING:
    from lightning_bn.callbacks.diagnosis import Diagnosis

_T = TypeVar("_T")
_ABOUT = """\
Checks a model, and the training that a YAML of LightningCLI describes, for
mistakes with BatchNorm before you train: layers that are only partly frozen,
batches too small for BatchNorm, layers that the forward never uses or that
different tasks share, averaged weights without recalibration, and more.

A few batches are run forward; nothing is trained. Each finding says which
layers it is about, why it hurts, and gives lines to paste that fix it.
"""
_MORE = """\
examples:
  lightning-bn doctor --config train.yaml
  lightning-bn doctor --config train.yaml --model mine:Net --data mine:Data
  lightning-bn doctor --config train.yaml --json | jq '.findings[].rule'
  lightning-bn doctor --model mypackage.models:build --input 8,3,64,64
  lightning-bn doctor --model torchvision.models:resnet50

A fault makes results worse. Advice is true and mostly harmless.

exit codes:
  0  no fault (advice alone is 0)
  1  a fault was found
  2  no fault was found, but something could not be checked: the model cannot be
     made, no batch can be run, or your code raised an error

Run it where you start the training. The code that the configuration or the
import path names is imported and run, as training does.
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its options."""
    parser = add_parser_to(subparsers, "doctor", _ABOUT, _MORE)
    parser.add_argument("--config", metavar="FILE", help="YAML of LightningCLI, as `fit --config` takes it")
    parser.add_argument(
        "--model",
        metavar="PATH:NAME",
        help="a function or class that makes the model, or the model itself; with --config the model's class, where "
        "the file does not name it",
    )
    parser.add_argument("--data", metavar="PATH:NAME", help="with --config: the datamodule's class, likewise")
    parser.add_argument(
        "--input", metavar="SHAPE", help="with --model alone: run it on random numbers of this shape, as 8,3,64,64"
    )
    parser.add_argument(
        "--batches", type=int, default=4, metavar="N", help="how many to run forward, 0 for none (default: 4)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    if not options.config and not options.model:
        raise UsersCodeError("give --config FILE or --model PATH:NAME; --help has examples.")
    if options.config and options.input is not None:
        raise UsersCodeError("--input goes with --model alone: a configuration has data of its own.")
    if options.data is not None and not options.config:
        raise UsersCodeError("--data goes with --config.")
    if options.batches < 0:
        raise UsersCodeError(f"--batches {options.batches}: give how many to run forward, or 0 for none.")
    with quiet():
        layers, found = _of_configuration(options) if options.config else _of_model(options)
    faults = sum(finding.severity == "fault" for finding in found.findings)
    if options.json:
        told = {"findings": found.findings, "not_looked_at": found.missing, "notes": found.notes}
        print(as_json({"layers": layers, **told}))
    else:
        parts = (found.findings, found.missing, found.notes)
        print("\n".join(report(layers, *parts, console_width(), with_yaml=bool(options.config))))
    return FOUND if faults else NO if found.missing else HEALTHY


def _of_configuration(options: argparse.Namespace) -> tuple[int, Diagnosis]:
    fit = configured(options)
    missing: dict[str, str] = {}
    _tried(missing, "a batch", fit.set_up_data)
    _tried(missing, "what the model makes in setup or configure_model", fit.set_up_module)
    batches: list[Any] = []
    if options.batches and not missing:
        batches = _tried(missing, "a batch", lambda: fit.batches(options.batches)) or []
    known: dict[str, Any] = {} if fit.processes is None else {"processes": fit.processes}
    return _diagnosed(fit.module, fit.trainer, batches, {**known, "synchronized": fit.synchronized}, missing)


def _tried(missing: dict[str, str], what: str, find: Callable[[], _T]) -> _T | None:
    """What the user's own code makes; None where it raises, which is then among what is missing."""
    try:
        return find()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        missing[what] = in_words(error)
        return None


def _of_model(options: argparse.Namespace) -> tuple[int, Diagnosis]:
    batches = [] if options.input is None else _random(options.input, options.batches)
    return _diagnosed(_model(options.model), None, batches, {}, {})


def _random(given: str, count: int) -> list[Any]:
    """Batches of random numbers."""
    import torch

    if not re.fullmatch(r"\s*[1-9][0-9]*\s*(,\s*[1-9][0-9]*\s*)*", given, re.ASCII):
        raise UsersCodeError(f"--input {given}: give whole numbers with commas, as 8,3,64,64.")
    try:
        return [torch.randn([int(one) for one in given.split(",")]) for _ in range(count)]
    except (RuntimeError, MemoryError, OverflowError, TypeError, ValueError) as error:
        raise UsersCodeError(f"--input {given}: there is not enough memory for so many values.") from error


def _diagnosed(
    model: Any, trainer: Any, batches: list[Any], known: dict[str, Any], missing: dict[str, str]
) -> tuple[int, Diagnosis]:
    """The number of layers, and what was found: without the batches where these cannot be run."""
    from dataclasses import replace

    from lightning_bn.callbacks.diagnosis import diagnosis
    from lightning_bn.functional.layers.names import named_batch_norm

    try:
        found = diagnosis(model, trainer, batches, **known)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's own step raises
        if not batches:
            raise UsersCodeError(in_words(error)) from error
        missing["a forward"] = in_words(error)
        found = diagnosis(model, trainer, **known)
    return len(named_batch_norm(model)), replace(found, missing={**missing, **found.missing})


def _model(path: str) -> Any:
    """The model that an import path leads to; a class or a function is called."""
    from torch import nn

    found = imported("--model", path)
    try:
        model = found if isinstance(found, nn.Module) else found()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the user's own code raises
        raise UsersCodeError(f"--model {path}: {in_words(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsersCodeError(f"--model {path} makes a {type(model).__name__}, which is not a torch.nn.Module.")
    return model
