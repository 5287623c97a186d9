"""A recalibration that takes long shows a bar beside the Trainer's own, which leaves no trace on the screen."""

import io
import re
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar as OtherRichProgressBar
from lightning.pytorch.callbacks import TQDMProgressBar as OtherTQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from pytorch_lightning.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from torch import nn
from torch.utils.data import DataLoader

from lightning_bn import PreciseBatchNorm
from lightning_bn.callbacks._lightning import progress
from lightning_bn.callbacks._second_run import long_pass
from tests.callbacks.fits import Classifier, quiet, train_loader, trajectory, val_loader
from tests.callbacks.freezing_fits import said

BARS: dict[str, Callable[[], Any]] = {
    "tqdm": TQDMProgressBar,
    "tqdm, moved": lambda: TQDMProgressBar(process_position=1),
    "rich": lambda: RichProgressBar(refresh_rate=200),
}


class Terminal(io.StringIO):
    """What is written to a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that somebody in front of it sees now."""
        lines, row, column = [""], 0, 0
        for piece in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\x1b.|[\r\n]|[^\x1b\r\n]+", self.getvalue()):
            if piece == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
                column = 0
            elif piece == "\r":
                column = 0
            elif piece.endswith("A") and piece.startswith("\x1b["):
                row -= int(piece[2:-1] or 1)
                assert row >= 0
            elif piece == "\x1b[2K":
                lines[row] = ""
            elif not piece.startswith("\x1b"):
                lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + len(piece) :]
                column += len(piece)
        return "\n".join(line.rstrip() for line in lines).rstrip("\n").split("\n")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name, value in {"TERM": "xterm", "COLUMNS": "110", "LINES": "40"}.items():
        monkeypatch.setenv(name, value)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(long_pass, "LONG", 0.0)
    return Terminal()


class Watched(Classifier):
    """Looks at the screen in every step of a recalibration."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not torch.is_grad_enabled() and TERMINAL:
            look()
        return super().training_step(batch, batch_idx)


#: The terminal, and its screen in every step of a recalibration. Outside of the module: what modules keep is restored.
TERMINAL: list[Terminal] = []
SEEN: list[list[str]] = []


def look() -> None:
    # TQDM draws every 0.1 s, rich in a thread.
    time.sleep(0.15)
    SEEN.append(TERMINAL[0].screen())


def fit(
    terminal: io.StringIO, bar: Any, precise: PreciseBatchNorm | None = None, module: Any = None, **trainer: Any
) -> None:
    """A fit of two epochs in front of a terminal."""
    SEEN.clear()
    TERMINAL[:] = [terminal] if isinstance(terminal, Terminal) else []
    callbacks = [precise or PreciseBatchNorm(3), *([bar] if bar is not None else [])]
    # Not in a fixture: pytest puts its own in the place of standard output when the test begins.
    with redirect_stdout(terminal):
        run = quiet(callbacks=callbacks, **{"enable_progress_bar": bar is not None, **trainer})
        run.fit(module or Watched(), train_loader(), val_loader())


@pytest.mark.parametrize("bar", BARS)
@pytest.mark.parametrize("source", ["train", "recent"])
def test_a_bar_stands_below_the_trainers_and_counts_the_batches(bar: str, source: Any, terminal: Terminal) -> None:
    fit(terminal, BARS[bar](), PreciseBatchNorm(3, source=source))
    assert len(SEEN) == 6
    for number, screen in enumerate(SEEN):
        [line] = [line for line in screen if "Recalibration" in line]
        assert f"{number % 3}/3" in line
        [own] = [line for line in screen if "Epoch " in line]
        assert screen.index(own) < screen.index(line)
        assert all(len(line) <= 110 for line in screen)


@pytest.mark.parametrize("bar", BARS)
def test_nothing_of_it_stays(bar: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def made(**options: Any) -> Any:
        # Nothing is closed only because nobody refers to it any more.
        kept.append(Tqdm(**options))
        return kept[-1]

    monkeypatch.setattr(progress, "Tqdm", made)
    fit(terminal, BARS[bar]())
    assert len(SEEN) == 6
    assert len(kept) == (0 if bar == "rich" else 2)
    plain = Terminal()
    monkeypatch.setattr(long_pass, "LONG", 1e9)
    fit(plain, BARS[bar]())
    left, without = ([re.sub(r"[\d.:?]+", "#", line) for line in one.screen()] for one in (terminal, plain))
    assert left == without
    assert not any("Recalibration" in line for line in left)
    assert not [one for one in Tqdm._instances if "Recalibration" in str(getattr(one, "desc", ""))]


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_nothing_of_it_stays_after_a_step_that_failed(bar: str, terminal: Terminal) -> None:
    class Fails(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            found = super().training_step(batch, batch_idx)
            if not torch.is_grad_enabled() and batch_idx == 1:
                raise OSError("lost")
            return found

    with pytest.raises(OSError, match="lost"):
        fit(terminal, BARS[bar](), module=Fails())
    assert any("Recalibration" in line for line in SEEN[-1])
    assert not any("Recalibration" in line for line in terminal.screen())
    assert not [one for one in Tqdm._instances if "Recalibration" in str(getattr(one, "desc", ""))]


def test_rich_gets_one_task_for_all_recalibrations(terminal: Terminal) -> None:
    bar = RichProgressBar(refresh_rate=200)
    fit(terminal, bar, max_epochs=4)
    assert bar.progress is not None
    [task] = [task for task in bar.progress.tasks if "Recalibration" in task.description]
    assert not task.visible
    assert [task.id for task in bar.progress.tasks] == [*range(len(bar.progress.tasks))]
    assert bar.val_progress_bar.description == "Validation"


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_where_nobody_knows_how_many_batches_there_are_the_bar_counts(bar: str, terminal: Terminal) -> None:
    class Endless(Watched):
        def endless(self) -> Any:
            return NoLength()

    precise = PreciseBatchNorm(None, num_samples=20, source_method="module.endless")
    fit(terminal, BARS[bar](), precise, Endless())
    assert len(SEEN) == 6
    for number, screen in enumerate(SEEN):
        [line] = [line for line in screen if "Recalibration" in line]
        assert f"{number % 3}/{'?' if bar == 'tqdm' else '--'}" in line


class NoLength:
    """Batches without an end or a length."""

    def __iter__(self) -> Any:
        while True:
            yield from train_loader(shuffle=False)


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_the_other_namespace_has_it_too(bar: str, terminal: Terminal) -> None:
    class Boring(BoringModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 2))  # type: ignore[assignment]

        def train_dataloader(self) -> Any:
            return DataLoader(torch.randn(16, 32), batch_size=4)

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            look()
            return self(batch)

    own = OtherTQDMProgressBar() if bar == "tqdm" else OtherRichProgressBar(refresh_rate=200)
    trainer = lightning.pytorch.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        limit_train_batches=4,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[PreciseBatchNorm(2, step="predict_step"), own],
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    SEEN.clear()
    TERMINAL[:] = [terminal]
    with redirect_stdout(terminal):
        trainer.fit(Boring())
    assert [sum("Recalibration" in line for line in screen) for screen in SEEN] == [1, 1]


def nothing_of(text: str) -> bool:
    return "Recalibration" not in text


def test_there_is_none_without_a_progress_bar(terminal: Terminal) -> None:
    with said() as lines:
        fit(terminal, None)
    assert nothing_of(terminal.getvalue())
    assert sum("recalibrating" in line for line in lines) == 2


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_there_is_none_without_a_terminal(bar: str, terminal: Terminal) -> None:
    file = io.StringIO()
    with said() as lines:
        fit(file, BARS[bar]())
    assert "Epoch" in file.getvalue()
    assert nothing_of(file.getvalue())
    assert sum("recalibrating" in line for line in lines) == 2


@pytest.mark.parametrize("bar", [TQDMProgressBar(refresh_rate=0), RichProgressBar(refresh_rate=0), ProgressBar()])
def test_there_is_none_beside_a_bar_that_is_switched_off_or_of_ones_own(bar: Any, terminal: Terminal) -> None:
    fit(terminal, bar)
    assert nothing_of(terminal.getvalue())


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_there_is_none_in_a_pass_that_is_short(bar: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert long_pass.LONG == 3.0
    fit(terminal, BARS[bar]())
    assert nothing_of(terminal.getvalue())


@pytest.mark.parametrize("bar", ["tqdm", "rich"])
def test_training_is_bit_identical_with_it(bar: str, terminal: Terminal) -> None:
    def data() -> dict[str, Any]:
        return {"train_dataloaders": train_loader(), "val_dataloaders": val_loader()}

    plain = trajectory(Classifier, data)
    with redirect_stdout(terminal):
        shown = trajectory(Classifier, data, PreciseBatchNorm(3), BARS[bar](), enable_progress_bar=True)
    assert not nothing_of(terminal.getvalue())
    assert shown[:2] == plain[:2]
