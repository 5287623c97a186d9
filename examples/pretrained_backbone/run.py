"""Runs the whole example: fits over several seeds, four tables, one figure."""

import argparse
import logging
import shutil
import time
import warnings
from functools import partial
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import cost
import drifting
import figure
import fine_tuning
import recalibrating
from data import NUM_TEST
from photographs import crops

OUTPUT = Path(__file__).parent / "output"
COLUMNS = (TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def main() -> None:
    """Fits, then tables, then the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds to run (default: 3)")
    seeds = range(parser.parse_args().seeds)
    be_quiet()
    # A second thread gains little with images this small, and waits where other processes use the cores.
    torch.set_num_threads(1)
    shutil.rmtree(OUTPUT / "fits", ignore_errors=True)
    console = Console()
    started = time.monotonic()

    tuned, recalibrated, costs = [], [], []
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task("", total=len(seeds) * (len(fine_tuning.ROWS) + 2))
        done = count()

        def announce(seed: int, text: str) -> None:
            progress.update(bar, description=f"seed {seed}: {text}", completed=next(done))

        for seed in seeds:
            tuned.append(fine_tuning.run(seed, OUTPUT / "fits" / f"seed_{seed}", partial(announce, seed)))
            announce(seed, "recalibrations")
            recalibrated.append(recalibrating.run(tuned[-1]))
            costs.append(cost.run(partial(announce, seed)))
        progress.update(bar, description="all done", completed=next(done))

    show(console, fine_tuning.table(tuned), fine_tuning.reading(tuned))
    show(console, recalibrating.table(recalibrated), recalibrating.reading(recalibrated))
    show(console, drifting.table(tuned), drifting.reading(tuned))
    show(console, cost.table(costs))
    path = figure.save(OUTPUT / "pretrained_backbone.png", tuned[0][fine_tuning.HEADS, False])
    fits, seconds = len(seeds) * len(fine_tuning.ROWS), time.monotonic() - started
    console.print(
        f"\nEach number: mean over {len(seeds)} seeds, below it least–largest; answers on {len(crops())} crops of two "
        f"photographs, new tasks on {NUM_TEST} pictures never trained on. {fits} fits and the rest in {seconds:.0f} s.",
        highlight=False,
    )
    console.print(f"Figure: {path}", highlight=False, soft_wrap=True)


def be_quiet() -> None:
    """Keeps what Lightning says about every fit off the terminal; what goes wrong is still said."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What the monitor says of a backbone that is not frozen is what the tables show.
    warnings.filterwarnings("ignore", "BatchNormMonitor")
    # In-memory batches are faster without worker processes, and Lightning reads its own pytree through an old name.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\).*")
    # run.py has arguments of its own beside those it gives to the LightningCLI.
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter is intended to run from within Python.*")


def show(console: Console, table: Table, *readings: str) -> None:
    """A table and what it says."""
    console.print("", table, *(["", *readings] if readings else []), sep="\n", highlight=False)


if __name__ == "__main__":
    main()
