"""What a checkpoint says of its BatchNorm layers as one page of HTML, which needs nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from lightning_bn._inspection_table import commands_of, in_words, next_step, remedies, source, summary, verdict
from lightning_bn.functional.inspection.inspect import InspectedEntry, Inspection
from lightning_bn.functional.inspection.layer_facts import LayerFacts
from lightning_bn.functional.statistics.opened_files import shown

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h1, h2, li, p { overflow-wrap: anywhere; }
.wide, pre { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left; }
.fault { background: #fde8e8; } .note { background: #fff6dd; }
rect { fill: #4878b0; } .fault rect { fill: #c0392b; }
rect.grid, .fault rect.grid { fill: #ddd; }
@media (prefers-color-scheme: dark) {
  body { background: #1c1e21; color: #ddd; } th, td { border-color: #444; }
  .fault { background: #4a2222; } .note { background: #453a1a; } rect.grid, .fault rect.grid { fill: #444; }
}
"""
_HEADINGS = ("layer", "channels", "updates", "mean", "variance", "variance, 1e-8 to 1e8", "found")
_DECADES = 8


def write_page(found: Inspection, callbacks: Mapping[str, str], out: str | Path) -> None:
    """Write the page.

    Args:
        found: What :func:`~lightning_bn.functional.inspect_checkpoint` gave.
        callbacks: What callbacks left in the file, in words.
        out: Where to.
    """
    Path(out).write_text("".join(_page(found, callbacks)), encoding="utf-8", errors="replace")


def _page(found: Inspection, callbacks: Mapping[str, str]) -> Iterator[str]:
    title = escape(verdict(found))
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title><style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    for heading, is_fault in (("What is wrong", True), ("Worth knowing", False)):
        yield from _list(heading, [in_words(one) for one in found.findings if one.is_fault == is_fault])
    for entry in found.entries:
        yield f"<h2>{escape(summary(entry).removesuffix('.'))}</h2>\n<div class='wide'><table><tr>"
        yield "".join(f"<th>{heading}</th>" for heading in _HEADINGS) + "</tr>\n"
        yield from _rows(entry, found)
        yield "</table></div>\n"
    yield from _list("What callbacks left in the file", [f"{key}: {said}" for key, said in callbacks.items()])
    yield from _list("What to do", remedies(found))
    if commands := commands_of(found):
        yield f"<p>{escape(next_step(found))}</p>\n"
        yield "".join(f"<pre>{escape(command)}</pre>\n" for command in commands)
    yield f"<p>{escape(source(found))}.</p>\n</body></html>\n"


def _list(heading: str, items: list[str]) -> Iterator[str]:
    if items:
        yield f"<h2>{heading}</h2>\n<ul>" + "".join(f"<li>{escape(item)}</li>\n" for item in items) + "</ul>\n"


def _rows(entry: InspectedEntry, found: Inspection) -> Iterator[str]:
    findings = [one for one in found.findings if one.entry == entry.key]
    for layer in entry.layers:
        kinds = [one for one in findings if layer.name in one.layers]
        kind = "fault" if any(one.is_fault for one in kinds) else "note" if kinds else ""
        cells = [
            escape(shown(layer.name)),
            f"{layer.channels:,}",
            "-" if layer.updates is None else f"{layer.updates:,}",
            _span(layer.mean),
            _span(layer.var),
            _bar(layer),
            escape(", ".join(one.kind for one in kinds) or "-"),
        ]
        yield f"<tr class='{kind}'>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"


def _span(values: tuple[float, float, float]) -> str:
    low, middle, high = values
    return f"<span title='median {middle:.3g}'>{low:.3g} to {high:.3g}</span>"


def _bar(layer: LayerFacts) -> str:
    """From the smallest to the largest variance, on a logarithmic scale; nothing where there is none."""
    low, _, high = (_place(value) for value in layer.var)
    bar = f"<rect x='{low:.1f}' y='3' width='{max(high - low, 2):.1f}' height='6'/>" if math.isfinite(low) else ""
    return (
        f"<svg width='120' height='12' role='img' aria-label='variances from {layer.var[0]:.3g} to {layer.var[2]:.3g}'>"
        f"<rect class='grid' x='0' y='5' width='120' height='2'/>{bar}</svg>"
    )


def _place(variance: float) -> float:
    if math.isnan(variance):
        return math.nan
    decades = math.log10(variance) if variance > 0 else -_DECADES
    return 120 * (min(max(decades, -_DECADES), _DECADES) + _DECADES) / (2 * _DECADES)
