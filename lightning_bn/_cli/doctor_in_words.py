"""What the doctor found, as text no wider than the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_bn._cli.common import printable
from lightning_bn._cli.wrapping import comment, indented, of_python, of_yaml, wrapped

if TYPE_CHECKING:
    from lightning_bn.functional.doctor.finding import Finding

_NAMES = (
    "Names in these lines: callbacks are from lightning_bn, functions from lightning_bn.functional; self is your "
    "module, model the network in it, loader what it trains on."
)


def report(
    layers: int,
    findings: Sequence[Finding],
    missing: Mapping[str, str],
    notes: Sequence[str],
    width: int,
    *,
    with_yaml: bool,
) -> Iterator[str]:
    """Yield lines no wider than a width; code in them can be copied, but where a name in it is wider.

    Args:
        layers: How many BatchNorm layers there are.
        findings: Of which to tell.
        missing: What could not be looked at, and why.
        notes: Further sentences.
        width: In cells.
        with_yaml: Whether to show what mends a YAML file as well.
    """
    faults = sum(finding.severity == "fault" for finding in findings)
    advice = len(findings) - faults
    unseen = f", {len(missing)} not looked at" if missing else ""
    yield from wrapped(
        f"{layers} BatchNorm layer{'s' * (layers != 1)}: {faults} fault{'s' * (faults != 1)}, "
        f"{advice} piece{'s' * (advice != 1)} of advice{unseen}.",
        width,
    )
    for finding in findings:
        yield ""
        yield from wrapped(f"{finding.severity.upper()} {finding.rule}", width)
        shown = ", ".join(printable(name) or "(the model itself)" for name in finding.layers[:5])
        more = f" and {len(finding.layers) - 5} more" if len(finding.layers) > 5 else ""
        for title, text in {"what": finding.what, "layers": shown + more, "why": finding.why}.items():
            further = " " * (10 if width >= 40 else 4)
            yield from wrapped(printable(text), width, f"  {title + ':':<8}", further)
        yield from _block("do:", finding.remedy, of_python, width)
        if with_yaml and finding.yaml:
            yield from _block("do, in a YAML:", finding.yaml, of_yaml, width)
    if findings:
        yield ""
        yield from wrapped(_NAMES, width)
    for what, why in missing.items():
        yield ""
        yield from wrapped(printable(f"Not looked at: {what} ({why})"), width)
    for note in notes:
        yield ""
        yield from wrapped(f"Note: {note}", width)


def _block(title: str, code: str, broken: Callable[[str, int], list[str]], width: int) -> Iterator[str]:
    """Rows of code below their title, all equally far from the left, so that they can be copied together."""
    yield f"  {title}"
    for line in code.splitlines():
        yield from indented(
            comment(line, width - 4) if line.startswith("#") else broken(line, width - 4), "    ", width
        )
