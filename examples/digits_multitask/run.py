"""Runs the whole example: three experiments over several seeds, three tables, one figure."""

import argparse
import shutil
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import alternating
import figure
import forgetting
import lagging
import learning_rate
from data import NUM_TEST
from fitting import be_quiet

OUTPUT = Path(__file__).parent / "output"
EXPERIMENTS = (forgetting, learning_rate, lagging, alternating)
COLUMNS = (TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def main() -> None:
    """Fits, then tables, then the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds to run (default: 5)")
    seeds = range(parser.parse_args().seeds)
    be_quiet()
    # Layers this small gain nothing from a second thread, and wait for it where other processes use the cores.
    torch.set_num_threads(1)
    shutil.rmtree(OUTPUT / "fits", ignore_errors=True)
    console = Console()
    started = time.monotonic()

    forgot, rates, lagged, alternated = [], [], [], []
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task("", total=len(seeds) * sum(experiment.FITS for experiment in EXPERIMENTS))
        done = count()
        for seed in seeds:
            announce = partial(start_fit, progress, bar, done, seed)
            folder = OUTPUT / "fits" / f"seed_{seed}"
            forgot.append(forgetting.run(seed, folder, announce))
            rates.append(learning_rate.run(seed, folder, announce))
            lagged.append(lagging.run(seed, announce))
            alternated.append(alternating.run(seed, announce))
        progress.update(bar, description="all fits done", completed=next(done))

    show(console, forgetting.table(forgot), forgetting.reading(forgot), learning_rate.reading(rates))
    show(console, lagging.table(lagged), lagging.reading(lagged))
    show(console, alternating.table(alternated), alternating.reading(alternated))
    path = figure.save(OUTPUT / "digits_multitask.png", forgot, lagged)
    console.print(
        f"\nEach number: mean over {len(seeds)} seeds, below it least–largest, on {NUM_TEST} images never trained on.\n"
        f"{next(done) - 1} fits in {time.monotonic() - started:.0f} s. Figure: {path}\n"
        f"Logs and checkpoints: {OUTPUT / 'fits'}",
        highlight=False,
        soft_wrap=True,
    )


def start_fit(progress: Progress, bar: TaskID, done: Iterator[int], seed: int, text: str) -> None:
    """Says which fit starts, and that the one before it is done."""
    progress.update(bar, description=f"seed {seed}: {text}", completed=next(done))


def show(console: Console, table: Table, *readings: str) -> None:
    """A table and what it says."""
    console.print("", table, "", *readings, sep="\n", highlight=False)


if __name__ == "__main__":
    main()
