"""``lightning-bn recalibrate``: a copy of a checkpoint with the running statistics of the training data."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from lightning_bn._cli.common import HEALTHY, add_json, add_parser_to, as_json, file_name, print_text
from lightning_bn._cli.users_code import UsersCodeError, configured, in_words, quiet

_ABOUT = """\
Computes the running mean and variance of each BatchNorm layer anew, from the
training data and with the weights in a checkpoint, and writes them into a copy
of it. Useful where the saved ones are off: for averaged weights, after weights
were changed, or after training with small batches.

Model, data, device and precision are taken from the YAML that trained it. No
weight changes; all else in the file stays as it is. A record of what was
recalibrated, which `lightning-bn inspect` reads, is added where there is a
place for it.
"""
_MORE = """\
examples:
  lightning-bn recalibrate --config train.yaml --ckpt_path a.ckpt --out b.ckpt
  lightning-bn recalibrate --config train.yaml --ckpt_path a.ckpt \\
      --average_with b.ckpt c.ckpt --out soup.ckpt
  lightning-bn recalibrate --config train.yaml --ckpt_path a.ckpt --out b.ckpt \\
      --model mine:Net --data mine:Data

The checkpoint may be of Lightning, a state dict, or a safetensors file, also in
several files under an index (model.safetensors.index.json). The averages that
Lightning's WeightAveraging saves are used; any other set of weights in the file
is chosen with --key, such as --key ema_state_dict. With --average_with, the
average of several checkpoints is made first (a "model soup"). Running
statistics that the file lacks are added.

It runs in one process, on one device, without the callbacks and loggers of the
YAML. A LightningCLI of your own gets the same as a subcommand: see
RecalibrateCommand.

The standard error that is printed says how far the worst channel may still be
off by chance, in standard deviations of its values: 0.05 is good, and more data
(--num_batches) makes it smaller.

exit codes:
  0  written
  2  it could not be done; nothing was written

Of checkpoints nothing is executed. What the configuration names is imported and
called, as the training itself does.
"""

_VALUED = ("out", "num_batches", "num_samples", "max_standard_error", "step", "modules", "exclude", "key", "prefix")
_FLAGS = ("recalibrate_frozen", "containers_in_eval", "overwrite")


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its options."""
    parser = add_parser_to(subparsers, "recalibrate", _ABOUT, _MORE)
    parser.add_argument(
        "--config", metavar="FILE", type=file_name, required=True, help="YAML of LightningCLI, as `fit --config`"
    )
    parser.add_argument(
        "--ckpt_path",
        metavar="FILE",
        type=file_name,
        required=True,
        help="the checkpoint, its index, or a folder with it",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=file_name, required=True, help="file to write; its suffix says the format"
    )
    parser.add_argument(
        "--average_with", metavar="FILE", type=file_name, nargs="+", default=[], help="more checkpoints of the model"
    )
    parser.add_argument("--model", metavar="PATH:NAME", help="the model's class, where the YAML does not name it")
    parser.add_argument("--data", metavar="PATH:NAME", help="the datamodule's class, likewise")
    parser.add_argument(
        "--num_batches", type=int, default=200, metavar="N", help="use at most so many batches (default: 200)"
    )
    parser.add_argument("--num_samples", type=int, metavar="N", help="use at most so many samples")
    parser.add_argument(
        "--max_standard_error", type=float, metavar="X", help="stop as soon as it is below; 0.05 is good"
    )
    parser.add_argument(
        "--step", default="training_step", metavar="NAME", help="method that runs a batch (default: training_step)"
    )
    parser.add_argument("--modules", nargs="+", metavar="PATH", help="only these layers: paths, globs or 're:...'")
    parser.add_argument("--exclude", nargs="+", metavar="PATH", help="not these layers")
    parser.add_argument("--key", metavar="KEY", help="which state dict of the file, where several fit")
    parser.add_argument("--prefix", metavar="TEXT", help="what the names in the file begin with, as in 'model.'")
    parser.add_argument("--recalibrate_frozen", action="store_true", help="also layers that the file records as frozen")
    parser.add_argument(
        "--containers_in_eval",
        action=argparse.BooleanOptionalAction,
        help="turn off dropout and stochastic depth that modules with others inside apply themselves; "
        "--no-containers_in_eval leaves them on, without saying so",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file that is to be written")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    try:
        _check_out(options)
        with quiet():
            done = _recalibrated(options)
    except (ValueError, OSError) as error:
        if error.args[1:] and isinstance(error, OSError):  # of the system, with the file's name
            raise
        raise UsersCodeError(_as_options(str(error))) from error
    from lightning_bn.functional.recalibration.result import error_in_words

    if options.json:
        names = ("path", "averaged", "files", "found", "not_in_model", "tasks_left", "entries_left", "added", "shards")
        result = done.recalibration
        of_result = {"layers": result.layers, "frozen": result.frozen, **result.metrics()}
        print(as_json({name: getattr(done, name) for name in names} | of_result))
    else:
        print_text(_as_options(str(done)))
        print_text(error_in_words(done.recalibration))
    return HEALTHY


def _check_out(options: argparse.Namespace) -> None:
    """Raise before anything is made where nothing can be written."""
    from lightning_bn.functional.statistics.writable import check_out

    out = Path(options.out)
    if not options.overwrite and out.is_file() and os.path.realpath(out) == os.path.realpath(options.ckpt_path):
        raise FileExistsError(
            f"{out} is the checkpoint itself: choose another out=, or pass overwrite=True to replace it."
        )
    check_out(options.out, options.overwrite)


def _as_options(text: str) -> str:
    """What a function says of its arguments, as options.

    Example:
        >>> _as_options("choose another out=, or pass overwrite=True, or key='ema' with prefix='model.'")
        "choose another --out, or pass --overwrite, or --key 'ema' with --prefix 'model.'"
    """
    names = "|".join((*_VALUED, *_FLAGS))
    text = re.sub(r"\b(containers_in_eval)=False\b", r"--no-\1", text)
    text = re.sub(rf"\b({names})=(True\b|(?=[\s,.;:)]|$))", r"--\1", text)
    return re.sub(rf"\b({names})=", r"--\1 ", text)


def _recalibrated(options: argparse.Namespace) -> Any:
    from lightning_bn.callbacks.cli import recalibrated

    fit = configured(options, one_process=True)
    if fit.processes is not None:
        print("This machine lacks what the configuration asks for: run on its CPU, in 32 bits.", file=sys.stderr)
    given = {name: getattr(options, name) for name in ("ckpt_path", "average_with", *_VALUED, *_FLAGS)}
    try:
        return recalibrated(fit.trainer, fit.module, fit.datamodule, **given)
    except (ValueError, OSError, ImportError):
        raise
    except (Exception, SystemExit) as error:  # whatever the user's own step and data raise
        if isinstance(error.__context__, KeyboardInterrupt):
            # Lightning's way to end after Ctrl-C is an exit.
            raise KeyboardInterrupt from error
        lightnings = type(error).__name__ == "MisconfigurationException"
        raise UsersCodeError(_as_options(str(error)) if lightnings else in_words(error)) from error
