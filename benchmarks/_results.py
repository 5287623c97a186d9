"""Results as a table to read, and the same as files in `benchmarks/results/`."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

_FOLDER = Path(__file__).parent / "results"


class Results:
    """The tables of one benchmark.

    Args:
        name: Of the files.
        question: What is measured, in a sentence or two.
        device: Where; its type is part of the files' names.
    """

    def __init__(self, name: str, question: str, device: torch.device | None = None) -> None:
        device = device or torch.device("cpu")
        self._file = f"{name}-{device.type}"
        self._console = Console(width=140)
        self._environment = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        }
        command = f"python benchmarks/{name}.py"
        measured = (
            f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPUs, "
            f"{torch.get_num_threads()} thread"
        )
        if device.type == "cuda":
            self._environment |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
            measured += f", {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
            command += " --device cuda"
        self._markdown = [f"# {name}, {device.type.upper()}", question, f"{measured}. Written by `{command}`."]
        self._tables: dict[str, list[dict[str, Any]]] = {}
        self._console.print(f"[bold]{question}[/bold]\n{measured}\n")

    def table(self, title: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
        """Prints one table and keeps it; numbers are right-aligned."""
        columns = list(rows[0])
        table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
        for row in rows:
            table.add_row(*(_shown(row[column]) for column in columns))
        self._console.print(table, "")
        align = ["---" if isinstance(rows[0][column], str) else "--:" for column in columns]
        lines = [columns, align, *([_shown(row[column]) for column in columns] for row in rows)]
        self._markdown += [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)] + [note] * bool(note)
        self._tables[title] = [dict(row) for row in rows]

    def write(self) -> None:
        """Writes them as Markdown and JSON."""
        _FOLDER.mkdir(exist_ok=True)
        (_FOLDER / f"{self._file}.md").write_text("\n\n".join(self._markdown) + "\n")
        written = {"environment": self._environment, "tables": self._tables}
        (_FOLDER / f"{self._file}.json").write_text(json.dumps(written, indent=2) + "\n")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
