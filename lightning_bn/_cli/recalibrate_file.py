"""``lightning-bn recalibrate``: a copy of a checkpoint with the running statistics of the training data."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from typing import Any

from lightning_bn._cli.common import HEALTHY, add_json, add_parser_to, as_json
from lightning_bn._cli.users_code import UsersCodeError, imported, quiet, see_working_folder

_ABOUT = """\
Writes a copy of a checkpoint whose running statistics are those of the training
data under the weights in it. Model and data are those of the YAML that trained
it, device and precision too. No weight changes, and everything else in the file
stays as it is; averaged weights are taken where the file has them.

Of several checkpoints the average is recalibrated (a "model soup").
"""
_MORE = """\
examples:
  lightning-bn recalibrate --config train.yaml --ckpt_path a.ckpt --out b.ckpt
  lightning-bn recalibrate --config train.yaml --ckpt_path a.ckpt \\
      --average_with b.ckpt c.ckpt --out soup.ckpt
  lightning-bn recalibrate --config train.yaml --ckpt_path a.ckpt --out b.ckpt \\
      --model mine:Net --data mine:Data

It runs in one process, on one device, whatever the file asks for. Callbacks and
loggers of the file take no part. A LightningCLI of your own gets the same as a
subcommand: see RecalibrateCommand.

exit codes:
  0  written
  2  it could not be done; nothing was written

Of checkpoints nothing is executed. What the configuration names is imported and
called, as the training itself does.
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its options."""
    parser = add_parser_to(subparsers, "recalibrate", _ABOUT, _MORE)
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML of LightningCLI, as `fit --config`")
    parser.add_argument("--ckpt_path", metavar="FILE", required=True, help="the checkpoint")
    parser.add_argument("--out", metavar="FILE", required=True, help="where to write")
    parser.add_argument("--average_with", metavar="FILE", nargs="+", default=[], help="more checkpoints of the model")
    parser.add_argument("--model", metavar="PATH:NAME", help="the model's class, where the YAML does not name it")
    parser.add_argument("--data", metavar="PATH:NAME", help="the datamodule's class, likewise")
    parser.add_argument("--num_batches", type=int, default=200, metavar="N", help="at most (default: 200)")
    parser.add_argument("--num_samples", type=int, metavar="N", help="at most")
    parser.add_argument("--max_standard_error", type=float, metavar="X", help="stop when below; 0.05 is a good value")
    parser.add_argument("--step", default="training_step", metavar="NAME", help="method that runs a batch")
    parser.add_argument("--modules", nargs="+", metavar="PATH", help="only these layers: paths, globs or 're:...'")
    parser.add_argument("--exclude", nargs="+", metavar="PATH", help="not these layers")
    parser.add_argument("--key", metavar="KEY", help="of the state dict in the file, where several fit")
    parser.add_argument("--prefix", metavar="TEXT", help="what names in the file have before the model's")
    parser.add_argument("--recalibrate_frozen", action="store_true", help="layers too that the file records as frozen")
    parser.add_argument("--overwrite", action="store_true", help="replace the file that is to be written")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    if os.path.exists(options.out) and not options.overwrite:
        raise FileExistsError(f"{options.out} exists: choose another --out, or add --overwrite to replace it.")
    with quiet():
        done = _recalibrated(options)
    if options.json:
        names = ("path", "averaged", "files", "found", "not_in_model", "tasks_left", "entries_left")
        result = done.recalibration
        of_result = {"layers": result.layers, "frozen": result.frozen, **result.metrics()}
        print(as_json({name: getattr(done, name) for name in names} | of_result))
    else:
        print("\n".join(textwrap.wrap(str(done), max(shutil.get_terminal_size().columns, 40))))
    return HEALTHY


def _recalibrated(options: argparse.Namespace) -> Any:
    from lightning_bn.callbacks._lightning.configured_fit import configured_fit
    from lightning_bn.callbacks.cli import recalibrated

    see_working_folder()
    given = {"model": options.model, "data": options.data}
    classes = {key: imported(f"--{key}", path) for key, path in given.items() if path is not None}
    fit = configured_fit(options.config, **classes, one_process=True)
    if fit.processes is not None:
        print("This machine lacks what the configuration asks for: run on its CPU, in 32 bits.", file=sys.stderr)
    passed_on: tuple[str, ...] = (
        "ckpt_path",
        "out",
        "average_with",
        "num_batches",
        "num_samples",
        "max_standard_error",
        "step",
    )
    passed_on += ("modules", "exclude", "key", "prefix", "recalibrate_frozen", "overwrite")
    try:
        return recalibrated(
            fit.trainer, fit.module, fit.datamodule, **{name: getattr(options, name) for name in passed_on}
        )
    except (ValueError, OSError, ImportError):
        raise
    except (Exception, SystemExit) as error:  # whatever the user's own step and data raise
        raise UsersCodeError(f"{type(error).__name__}: {error}") from error
