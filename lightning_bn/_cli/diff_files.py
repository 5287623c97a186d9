"""``lightning-bn diff``: how far the running statistics of two checkpoints lie apart."""

from __future__ import annotations

import argparse
import dataclasses
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
Compare the running statistics of two checkpoints: how far each BatchNorm layer
moved from A to B, the furthest first.

A and B are what `lightning-bn inspect` takes. Layers are matched by name.
Prefixes of wrappers (module., _forward_module., _orig_mod.) are ignored, and so
are prefixes that only one file has (model.); the output says which.
"""
_MORE = """\
examples:
  lightning-bn diff pretrained.pth fine_tuned.ckpt
  lightning-bn diff last.ckpt last.ckpt --keys state_dict current_model_state
  lightning-bn diff before.ckpt after.ckpt --modules backbone --fail-above 0.1

measures of drift between two channels; that of a layer is its largest:
  jeffreys            0.1 is a variance x1.56 or a mean 0.32 sigma off
  wasserstein         squared distance in variances of A
  mean_shift          in standard deviations of A
  log_variance_ratio  0.69 is a doubled variance
  hellinger           0 to 1
  output              mean squared change of the layer's output in evaluation

exit code: 0, also where layers moved. It is 1 where a layer is not whole, as
without its running_var; with --fail-above X also where a layer is beyond X or
not finite, is in one file only, or has other channels.
"""


def add_parser(subparsers: Any) -> None:
    """Add the subcommand and its options."""
    parser = add_parser_to(subparsers, "diff", _ABOUT, _MORE)
    parser.add_argument("first", metavar="A", type=file_name, help="checkpoint that drift is measured from")
    parser.add_argument("second", metavar="B", type=file_name, help="checkpoint that is measured")
    parser.add_argument("--fail-above", type=_threshold, metavar="X", help="exit code 1 where a layer is beyond X")
    parser.add_argument("--measure", default="jeffreys", metavar="NAME", help="of drift (default: jeffreys)")
    parser.add_argument("--modules", metavar="PATH", nargs="+", help="only these layers, as for inspect")
    parser.add_argument("--keys", metavar=("A", "B"), nargs=2, help="state dicts in the files, as inspect names them")
    parser.add_argument("--all", action="store_true", help="list all layers, not only the first 20")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    from lightning_bn._comparison_table import broken_of, comparison_report, faults_of
    from lightning_bn.functional.inspection.compare import compare_checkpoints

    keys = tuple(options.keys) if options.keys else (None, None)
    with one_thread():
        found = compare_checkpoints(options.first, options.second, options.measure, modules=options.modules, keys=keys)
    faults = faults_of(found, options.fail_above)
    if options.json:
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        print(as_json({**fields, "layers": found.worst_first(), "fail_above": options.fail_above, "faults": faults}))
    else:
        print_parts(comparison_report(found, options.fail_above, most=None if options.all else 20))
    return FOUND if broken_of(found) or (faults and options.fail_above is not None) else HEALTHY


def _threshold(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 on")
    return value
