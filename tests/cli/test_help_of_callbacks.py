"""What a LightningCLI shows of a callback with ``--trainer.callbacks.help``: text, not the marks of docstrings."""

import re

import pytest
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel

#: Double backticks, roles, and the lists and blocks that docstrings of other projects have.
MARKS = re.compile(r"``|:[a-z]+:`|^\s*(?:Args|Returns|Raises|Example):|\.\. \w+::", re.M)


def shown(callback: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        LightningCLI(BoringModel, args=["fit", f"--trainer.callbacks.help={callback}"])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("callback", ["BatchNormFreezer", "BatchNormMonitor", "PreciseBatchNorm", "TaskBatchNorm"])
def test_every_setting_is_explained_without_marks(callback: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(f"lightning_bn.{callback}", capsys)
    entries = re.split(r"^  --trainer\.callbacks\.", text, flags=re.M)[1:]
    assert {"modules", "exclude", "root", "name"} <= {re.match(r"\w+", entry)[0] for entry in entries}
    for entry in entries:
        _, _, explained = re.sub(r"\s+", " ", entry).partition(entry.split("\n")[0].split(" ")[-1])
        assert len(explained.partition("(")[0]) > 10, entry
    assert MARKS.findall(text) == []


def test_marks_are_seen() -> None:
    text = "As for :func:`~a.b`, ``c``.\n  Args:\n    .. note:: d\nRead `e` (type: f, default: g): h"
    assert len(MARKS.findall(text)) == 5
