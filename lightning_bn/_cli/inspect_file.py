"""``lightning-bn inspect``: every BatchNorm layer of a checkpoint, and what is wrong with it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_bn._cli.common import (
    FOUND,
    HEALTHY,
    add_json,
    add_parser_to,
    as_json,
    file_name,
    one_thread,
    print_parts,
)

_ABOUT = """\
List the BatchNorm layers of a checkpoint: what is wrong with them and how to
mend it, updates, and ranges of mean and variance.

FILE is a checkpoint of Lightning, a state dict, nested or not, a safetensors
file, the index of a sharded checkpoint, or a folder that holds one of these.
Averaged weights, statistics of several tasks and what callbacks of lightning_bn
saved in the file are shown too. Nothing in it is executed.
"""
_MORE = """\
examples:
  lightning-bn inspect last.ckpt
  lightning-bn inspect last.ckpt --modules backbone --all
  lightning-bn inspect model.safetensors --html report.html --plot report.png
  lightning-bn inspect last.ckpt --json | jq '.findings[].what'

exit code 1 if there is a fault:
  not finite         a mean, variance, weight or bias is NaN or infinite
  negative variance  a variance is below 0
  zeros              all means and variances of a layer are 0
  never updated      a layer has mean 0 and variance 1, and counted no update
  unmoved            the same although updates were counted
  collapsed          half of a layer's variances or more are below 1e-5, where
                     the weight is not near zero
  exploding          mean and four standard deviations are beyond 65,504, where
                     float16 ends, or a standard deviation is 1,000 times the
                     median of the layer
  broken             a running_mean without its running_var, of another size,
                     without values, or of a kind that no BatchNorm has
worth knowing, and exit code 1 with --strict only:
  dead channels      less than half of a layer's variances are below 1e-5
  warming up         fewer than 44 updates: more than 1 % of the initial values
                     is left
  out of scale       the median variance of a layer is 10,000 times that of
                     the other layers
  counters           layers have different numbers of updates
  counters lost      counters are 0, and the statistics are not the initial ones
  weights near zero  of half of a layer's channels, below 1e-3
  averages           averaged weights, whose statistics may not fit them
  other kind         running statistics that are no BatchNorm's

A file does not say a layer's momentum and eps: torch's own, 0.1 and 1e-5, are
assumed. An InstanceNorm with running statistics looks as a BatchNorm does.

Memory: torch's own, ten times the BatchNorm layers (of which 64 MiB are read at
most), and for files of torch.save what is no tensor (16 MiB at most; up to 100
times as much where a file was made to harm). Files of torch before 1.6 are read
whole.
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its options."""
    parser = add_parser_to(subparsers, "inspect", _ABOUT, _MORE)
    parser.add_argument("file", metavar="FILE", type=file_name, help="checkpoint, index of shards, or folder")
    parser.add_argument(
        "--modules", metavar="PATH", nargs="+", help="only these layers: paths, globs ('**.bn?') or 're:...'"
    )
    parser.add_argument("--all", action="store_true", help="list all layers, not only the first 20")
    parser.add_argument("--strict", action="store_true", help="exit code 1 also for what is only worth knowing")
    parser.add_argument("--html", type=file_name, metavar="FILE.html", help="also write a report as one page")
    parser.add_argument("--plot", type=file_name, metavar="FILE.png", help="also draw a figure (needs matplotlib)")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    from lightning_bn._callback_states import callbacks_in_words
    from lightning_bn.functional.inspection.inspect import inspect_checkpoint

    _check_reports(options, [options.file])
    with one_thread():
        found = inspect_checkpoint(options.file, options.modules)
    _check_reports(options, found.files)
    callbacks = callbacks_in_words(found.callbacks, found.about)
    if options.plot:
        from lightning_bn._inspection_figure import write_figure

        write_figure(found, options.plot)
    if options.html:
        from lightning_bn._inspection_page import write_page

        write_page(found, callbacks, options.html)
    if options.json:
        print(as_json({**{name: getattr(found, name) for name in _FIELDS}, "callbacks": callbacks}))
    else:
        from lightning_bn._inspection_table import inspection_report

        print_parts(inspection_report(found, callbacks, most=None if options.all else 20))
    return FOUND if (found.findings if options.strict else found.faults) else HEALTHY


_SUFFIXES = {
    "html": (".html", ".htm"),
    "plot": (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps"),
}


def _check_reports(options: argparse.Namespace, read: Iterable[str | Path]) -> None:
    """Raise where a report would replace what is no report of its kind.

    Raises:
        FileExistsError: If it is one of the files that are read, another report, or a file without its suffix.
    """
    reports = {option: Path(path) for option in _SUFFIXES if (path := getattr(options, option)) is not None}
    inputs = [Path(one) for one in read if os.path.exists(one)]
    for option, path in reports.items():
        if path.exists() and any(map(path.samefile, inputs)):
            raise FileExistsError(f"--{option} {path} is a file that is read: name another one.")
        kinds = _SUFFIXES[option]
        if path.exists() and path.suffix.lower() not in kinds:
            raise FileExistsError(
                f"--{option} {path} exists and is no {kinds[0]}: it is not replaced, name another one."
            )
    if len({os.path.realpath(path) for path in reports.values()}) < len(reports):
        raise FileExistsError("--html and --plot name the same file: choose two.")


_FIELDS = ("path", "files", "kind", "size", "about", "findings", "entries")
