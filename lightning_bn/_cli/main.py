"""The console command ``lightning-bn``: which subcommands there are, and what every one of them does with an error."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

from lightning_bn._cli.common import NO, Parser, WrongOptionError, as_json, said
from lightning_bn._cli.pipes import whoever_reads

SUBCOMMANDS = {
    "inspect": (
        "lightning_bn._cli.inspect_file",
        "list the BatchNorm layers of a checkpoint and what is wrong with them",
    ),
    "diff": ("lightning_bn._cli.diff_files", "compare the running statistics of two checkpoints"),
    "recalibrate": (
        "lightning_bn._cli.recalibrate_file",
        "write a copy of a checkpoint with the statistics of the training data",
    ),
    "doctor": ("lightning_bn._cli.doctor", "look for mistakes in a model and its training, before it is trained"),
    "tasks": ("lightning_bn._cli.tasks_of_file", "compare the statistics of the tasks in a checkpoint"),
}
"""Their names, the file of each and one line on it; a file has ``add_parser`` and ``run`` and is imported if named."""

_READ_FILES = ("inspect", "diff", "tasks")
"""Those that end within seconds."""

_ABOUT = """\
Find out what is wrong with the BatchNorm layers of a model, from checkpoints or
from the configuration that trains it, and mend it.
"""
_EXAMPLES = """\
examples:
  lightning-bn inspect last.ckpt             what is in it, what is wrong?
  lightning-bn inspect runs/7 --json         the same for a program
  lightning-bn diff before.ckpt after.ckpt   what moved, furthest first
  lightning-bn diff a.pt b.pt --fail-above 0.1
                                             a check for a pipeline
  lightning-bn tasks multi.ckpt              which layers need a set per task
  lightning-bn recalibrate --config train.yaml --ckpt_path a.ckpt --out b.ckpt
                                             mend its running statistics
  lightning-bn doctor --config train.yaml    mistakes before anything is trained
  lightning-bn inspect --help                all options of one of them

exit codes:
  0  healthy, or done
  1  something was found
  2  it could not be done: no such file, no checkpoint, a wrong option
They are the same where a reader stops early, as `| head` does.

Checkpoints are read without executing anything that is in them. `doctor` and
`recalibrate` make the model that they are given, as the training does.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 healthy or done, 1 something was found, 2 it could not be done.

    The exit code is the same where whoever reads the output stops early, as ``head`` does.

    Args:
        argv: Its arguments; None for those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and arguments[:1] and arguments[0] in _READ_FILES:
        # Of a process that ends this soon, a fifth would go into cycles of garbage, looked for while torch is imported.
        gc.disable()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a name from a file may have what a console cannot show
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    unwritten: list[OSError] = []
    try:
        with whoever_reads(unwritten), warnings.catch_warnings():
            # What a library says of its own future is nothing to the reader of a file.
            warnings.simplefilter("ignore")
            code = _run(arguments)
    except KeyboardInterrupt:
        return 130
    except SystemExit:  # of --help
        if not unwritten:
            raise
        return NO
    return NO if unwritten else code


def _run(arguments: list[str]) -> int:
    command = "lightning-bn"
    try:
        parser = _parser(arguments)
        options = parser.parse_args(arguments)
        if options.command is None:
            parser.print_help()
            return NO
        command = f"lightning-bn {options.command}"
        code: int = importlib.import_module(SUBCOMMANDS[options.command][0]).run(options)
        return code
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a file made to harm or code of the user may raise: one line, no traceback
        why = said(error)
        if "--json" in arguments:
            print(as_json({"error": why}))
        if isinstance(error, WrongOptionError):
            print(error.usage, end="", file=sys.stderr)
            command = error.command
        print(f"{command}: {why}", file=sys.stderr)
        return NO


def _parser(arguments: Sequence[str]) -> Parser:
    """Of all subcommands, with the options of the one that is named."""
    from lightning_bn import __version__

    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("lightning-bn", description=_ABOUT, epilog=_EXAMPLES, formatter_class=form)
    parser.add_argument("--version", action="version", version=f"lightning-bn {__version__}")
    subparsers = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    named = next((one for one in arguments if not one.startswith("-")), None)
    for name, (module, summary) in SUBCOMMANDS.items():
        if name == named:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser
