"""How tables look."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.padding import PaddingDimensions
from rich.table import Column, Table


def plain_table(
    title: str, caption: str | None, columns: Sequence[Column], padding: PaddingDimensions = (0, 1)
) -> Table:
    """A table without frames, with a title above and a caption below it."""
    return Table(
        *columns, title=title, caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=padding
    )
