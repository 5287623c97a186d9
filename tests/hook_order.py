"""Who acts when in a fit, recorded; ``python -m tests.hook_order`` draws docs/images/hook_order.svg of it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_bn import BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm, TaskBatchNorm
from tests.averages import EMAWeightAveraging
from tests.models import BodyAndHead

FIGURE = Path(__file__).parent.parent / "docs" / "images" / "hook_order.svg"
HOOKS = [name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
STARTS = ("setup", "on_fit_start", "on_train_start", "on_train_epoch_start")
BATCH = ("on_train_batch_start", "training_step", "on_after_backward", "on_before_optimizer_step", "optimizer_step")


class Event(NamedTuple):
    part: str
    hook: str
    who: str


class Row(NamedTuple):
    """A hook of one part of a fit, and who is called there, in this order; nobody for the module's own methods."""

    part: str
    hook: str
    who: tuple[str, ...]


class EventModule(pl.LightningModule):
    """Notes its own steps; what a recalibration runs works on copies, and notes nothing."""

    def __init__(self, events: list[Event]) -> None:
        super().__init__()
        self.net, self.events = BodyAndHead(), events
        self.net(torch.randn(64, 3))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.events.append(Event("each batch", "training_step", ""))
        return self.net(batch["x"]).square().mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.events.append(Event("each batch", "optimizer_step", ""))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.events.append(Event(part_of(self.trainer, "validation_step"), "validation_step", ""))
        self.net(batch["x"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def part_of(trainer: pl.Trainer, hook: str) -> str:
    """Which part of the fit a hook is called in."""
    if trainer.sanity_checking or hook.startswith("on_sanity"):
        return "sanity check"
    if hook in STARTS:
        return "start"
    if hook.startswith("on_validation") or hook == "validation_step":
        return "validation"
    return "each batch" if hook in (*BATCH, "on_train_batch_end") else "end"


def noted(callback: Callback, events: list[Event]) -> Callback:
    """The callback, with every hook that its class has noting that it was called."""

    def call(hook: str, original: Callable[..., Any], trainer: pl.Trainer, *args: Any, **kwargs: Any) -> Any:
        events.append(Event(part_of(trainer, hook), hook, type(callback).__name__))
        return original(trainer, *args, **kwargs)

    for hook in HOOKS:
        if getattr(type(callback), hook) is not getattr(Callback, hook):
            setattr(callback, hook, partial(call, hook, getattr(callback, hook)))
    return callback


def recorded(folder: Path) -> tuple[list[Event], list[str]]:
    """What was called in a fit of one epoch with validation, and the callbacks in the Trainer's order."""
    events: list[Event] = []
    callbacks = [
        BatchNormFreezer("net.body"),
        BatchNormMonitor(every_n_steps=1, report=False),
        PreciseBatchNorm(),
        TaskBatchNorm(["a", "b"], task_key="task"),
        EMAWeightAveraging(decay=0.9),
        ModelCheckpoint(folder),
    ]
    trainer: Any = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[noted(callback, events) for callback in callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [{"x": torch.randn(16, 3), "task": task} for task in ("a", "b", "a")]
    trainer.fit(EventModule(events), DataLoader(batches, batch_size=None), DataLoader(batches[:2], batch_size=None))
    names = {type(callback).__name__ for callback in callbacks}
    return events, [name for name in (type(one).__name__ for one in trainer.callbacks) if name in names]


def rows(events: Sequence[Event]) -> list[Row]:
    """The events hook by hook, without the sanity check, repetitions left out.

    Raises:
        AssertionError: If a hook called again is not called as it was before.
    """
    found: list[Row] = []
    before: Event | None = None
    for event in events:
        if event.part == "sanity check":
            continue
        again = before is not None and before[:2] == event[:2] and event.who not in found[-1].who and event.who
        if again:
            found[-1] = found[-1]._replace(who=(*found[-1].who, event.who))
        else:
            found.append(Row(event.part, event.hook, (event.who,) if event.who else ()))
        before = event
    first: dict[tuple[str, str], Row] = {}
    for row in found:
        assert first.setdefault(row[:2], row) == row, f"{row} differs from {first[row[:2]]}"
    return list(first.values())


WIDTH, HEIGHT, LEFT, TOP, STEP = 380, 17, 182, 118, 33
COLORS = {
    "TaskBatchNorm": "#8250a8",
    "BatchNormFreezer": "#1f6fb4",
    "BatchNormMonitor": "#c26a00",
    "EMAWeightAveraging": "#777777",
    "PreciseBatchNorm": "#23803a",
    "ModelCheckpoint": "#777777",
}


def drawn(found: Sequence[Row], columns: Sequence[str]) -> str:
    """The figure: a line for each hook, a column for each callback, and in each dot which is called first."""
    parts = list(dict.fromkeys(row.part for row in found))
    lines, y = [], TOP
    for i, name in enumerate(columns):
        x = LEFT + i * STEP
        lines.append(
            f'<text transform="translate({x},{TOP - 8}) rotate(-68)" fill="{COLORS[name]}" class="head">{name}</text>'
        )
    for part in parts:
        y += HEIGHT + 6
        lines.append(f'<text x="6" y="{y}" class="part">{part}</text>')
        lines.append(f'<path d="M6 {y + 4}H{WIDTH - 6}" stroke="#bbbbbb"/>')
        for row in (row for row in found if row.part == part):
            y += HEIGHT
            lines.append(f'<text x="6" y="{y}" class="{"hook" if row.who else "own"}">{row.hook}</text>')
            for number, name in enumerate(row.who, 1):
                x = LEFT + columns.index(name) * STEP
                lines.append(f'<circle cx="{x}" cy="{y - 4}" r="7.5" fill="{COLORS[name]}"/>')
                lines.append(f'<text x="{x}" y="{y}" class="number">{number}</text>')
    y += 10
    style = (
        "text{font:11px sans-serif}.hook,.own{font:10.5px monospace}.own{fill:#777777;font-style:italic}"
        ".part{font-weight:bold}.head{font-size:10px}.number{fill:#ffffff;text-anchor:middle}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">',
            f"<style>{style}</style>",
            f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>',
            *lines,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Draw the figure of a run, and print the table of docs/hook_order.md."""
    with TemporaryDirectory() as folder:
        events, columns = recorded(Path(folder))
    found = rows(events)
    FIGURE.write_text(drawn(found, columns), encoding="utf-8")
    print(table(found))


def table(found: Sequence[Row]) -> str:
    """The rows as a table in Markdown."""
    head = ["| part | hook | who is called, in this order |", "|---|---|---|"]
    body = [f"| {part} | `{hook}` | {', '.join(who) or 'the module itself'} |" for part, hook, who in found]
    return "\n".join([*head, *body])


if __name__ == "__main__":
    main()
