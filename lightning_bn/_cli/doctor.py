"""``lightning-bn doctor``: mistakes with BatchNorm in a model or a training configuration, before it is run."""

from __future__ import annotations

import argparse
import ast
import shutil
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning_bn._cli.common import FOUND, HEALTHY, NO, add_json, add_parser_to, as_json
from lightning_bn._cli.users_code import UsersCodeError, configured, imported, in_words, quiet

if TYPE_CHECKING:
    from lightning_bn.callbacks.diagnosis import Diagnosis

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
_NAMES = (
    "Names in these lines: callbacks are from lightning_bn, functions from lightning_bn.functional; self is your "
    "module, model the network in it, loader what it trains on."
)


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
    if options.config and options.input:
        raise UsersCodeError("--input goes with --model alone: a configuration has data of its own.")
    if options.data and not options.config:
        raise UsersCodeError("--data goes with --config.")
    with quiet():
        layers, found = _of_configuration(options) if options.config else _of_model(options)
    faults = sum(finding.severity == "fault" for finding in found.findings)
    if options.json:
        told = {"findings": found.findings, "not_looked_at": found.missing, "notes": found.notes}
        print(as_json({"layers": layers, **told}))
    else:
        print("\n".join(_report(layers, found, with_yaml=bool(options.config))))
    return FOUND if faults else NO if found.missing else HEALTHY


def _of_configuration(options: argparse.Namespace) -> tuple[int, Diagnosis]:
    fit = configured(options)
    batches: list[Any] = []
    missing = {}
    if options.batches > 0:
        try:
            batches = fit.batches(options.batches)
        except (Exception, SystemExit) as error:  # whatever the user's own data raise
            missing["a batch"] = in_words(error)
    known: dict[str, Any] = {} if fit.processes is None else {"processes": fit.processes}
    return _diagnosed(fit.module, fit.trainer, batches, {**known, "synchronized": fit.synchronized}, missing)


def _of_model(options: argparse.Namespace) -> tuple[int, Diagnosis]:
    import torch

    batches = []
    if options.input:
        try:
            shape = [int(one) for one in options.input.split(",")]
        except ValueError:
            raise UsersCodeError(f"--input {options.input}: give whole numbers with commas, as 8,3,64,64.") from None
        batches = [torch.randn(shape) for _ in range(max(options.batches, 0))]
    return _diagnosed(_model(options.model), None, batches, {}, {})


def _diagnosed(
    model: Any, trainer: Any, batches: list[Any], known: dict[str, Any], missing: dict[str, str]
) -> tuple[int, Diagnosis]:
    """The number of layers, and what was found: without the batches where these cannot be run."""
    from dataclasses import replace

    from lightning_bn.callbacks.diagnosis import diagnosis
    from lightning_bn.functional.layers.names import named_batch_norm

    try:
        found = diagnosis(model, trainer, batches, **known)
    except (Exception, SystemExit) as error:  # whatever the user's own step raises
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
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise UsersCodeError(f"--model {path}: {in_words(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsersCodeError(f"--model {path} makes a {type(model).__name__}, which is not a torch.nn.Module.")
    return model


def _report(layers: int, found: Diagnosis, *, with_yaml: bool) -> Iterator[str]:
    """Lines no wider than the console, but for code that cannot be broken."""
    width = max(shutil.get_terminal_size().columns, 40)
    faults = sum(finding.severity == "fault" for finding in found.findings)
    advice = len(found.findings) - faults
    unseen = f", {len(found.missing)} not looked at" if found.missing else ""
    yield (
        f"{layers} BatchNorm layer{'s' * (layers != 1)}: {faults} fault{'s' * (faults != 1)}, "
        f"{advice} piece{'s' * (advice != 1)} of advice{unseen}."
    )
    for finding in found.findings:
        yield ""
        yield f"{finding.severity.upper()} {finding.rule}"
        shown = ", ".join(name or "(the model itself)" for name in finding.layers[:5])
        more = f" and {len(finding.layers) - 5} more" if len(finding.layers) > 5 else ""
        for title, text in {"what": finding.what, "layers": shown + more, "why": finding.why}.items():
            yield from textwrap.wrap(text, width, initial_indent=f"  {title + ':':<8}", subsequent_indent=" " * 10)
        yield from _block("do:", [row for line in finding.remedy.splitlines() for row in _code(line, width - 4)])
        if with_yaml and finding.yaml:
            rows = [_comment(row, width - 4) if row.startswith("#") else [row] for row in finding.yaml.splitlines()]
            yield from _block("do, in a YAML:", [part for row in rows for part in row])
    if found.findings:
        yield ""
        yield from textwrap.wrap(_NAMES, width)
    for what, why in found.missing.items():
        yield ""
        yield from textwrap.wrap(f"Not looked at: {what} ({' '.join(why.split())})", width)
    for note in found.notes:
        yield ""
        yield from textwrap.wrap(f"Note: {note}", width)


def _block(title: str, rows: list[str]) -> Iterator[str]:
    """Rows below their title, all equally far from the left, so that they can be copied together."""
    yield f"  {title}"
    yield from (f"    {row}" for row in rows)


def _code(line: str, width: int) -> list[str]:
    """A line of Python in rows of a width, which are still Python; the line itself where it cannot be broken."""
    if line.startswith("#"):
        return _comment(line, width)
    indent = " " * (len(line) - len(line.lstrip()))
    rows = textwrap.wrap(line, width, subsequent_indent=f"{indent}    ", break_long_words=False, break_on_hyphens=False)
    try:
        ast.parse("\n".join(row[len(indent) :] for row in rows))
    except SyntaxError:  # also of the first line of a block, which is none alone
        return [line]
    return rows


def _comment(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, width, subsequent_indent="# ")
