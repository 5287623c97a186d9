"""How the tables write a number that was measured once per seed: the mean, and below it the least and the largest."""

from collections.abc import Sequence
from statistics import fmean

from rich import box
from rich.table import Table


def results_table(title: str, labels: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table that fits 80 columns: columns of text to the left, columns of numbers to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0)
    for label in labels:
        table.add_column(label, vertical="top", no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", vertical="top", no_wrap=True)
    return table


def spread(values: Sequence[float], decimals: int = 1) -> str:
    """``mean`` over the seeds, and on a second line, dim, ``least–largest``."""
    least, largest = (f"{value:.{decimals}f}" for value in (min(values), max(values)))
    return f"{fmean(values):.{decimals}f}\n[dim]{least}–{largest}[/dim]"
