"""Pages in Markdown: their code run, what they say it prints compared, their YAML given to LightningCLI."""

import contextlib
import io
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning
import yaml

FENCE = re.compile(
    r"^(?:<!-- (?:not executed: (?P<reason>[^\n]+?)|(?P<shared>begins every block below)) -->\n+)?"
    r"```python *\n(?P<code>.*?)^```[ \t]*$"
    r"(?:\n+(?:[A-Z][^\n`]*:\n\n)?```text\n(?P<printed>.*?)^```[ \t]*$)?",
    re.M | re.S,
)
YAML = re.compile(r"^```yaml *\n(?P<text>.*?)^```[ \t]*$", re.M | re.S)
#: Callbacks of Lightning that the oldest supported version lacks, and the version that brought them.
SINCE = {"EMAWeightAveraging": "2.6", "WeightAveraging": "2.6"}
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")


class Block(NamedTuple):
    line: int
    code: str
    reason: str | None
    printed: str | None


def blocks(text: str) -> list[Block]:
    """The ```python blocks of a page in their order.

    With the line each begins at, why it is not executed, if so, and the ```text block that follows it: what it prints.
    One that begins every block below is put before them, also before their lines, so that tracebacks have the page's.
    """
    found, shared = [], ""
    for one in FENCE.finditer(text):
        line = text.count("\n", 0, one.start("code")) + 1 - shared.count("\n")
        found.append(Block(line, shared + one["code"], one["reason"], one["printed"]))
        shared = one["code"] if one["shared"] else shared
    return found


def run(block: Block, page: Path | str) -> dict[str, Any]:
    """Execute a block in a namespace of its own, with the page's line numbers in tracebacks; return the namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
    return namespace


def skip_without_callbacks_of(text: str) -> None:
    """Skip the test where Lightning lacks a callback that a text uses."""
    for name, version in SINCE.items():
        if re.search(rf"\b{name}\b", text) and not hasattr(pytorch_lightning.callbacks, name):
            pytest.skip(f"{name} needs pytorch-lightning {version} or newer")


class Printed(logging.Handler):
    """What was printed and logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.stream = io.StringIO()

    def emit(self, record: logging.LogRecord) -> None:
        self.stream.write(record.getMessage() + "\n")


@contextlib.contextmanager
def recorded() -> Iterator[io.StringIO]:
    """Yield what is printed, and what Lightning logs, inside."""
    handler = Printed()
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with contextlib.redirect_stdout(handler.stream):
            yield handler.stream
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def lines(text: str) -> list[str]:
    """Lines without what differs between machines: numbers, widths and small curves."""
    # A progress bar leaves its line with an escape code, and what follows is a line of its own.
    masked = re.sub(r"[▁▂▃▄▅▆▇█]+", "▁", re.sub(r"[ ━─]+", " ", NUMBER.sub("#", text.replace("\x1b[A", "\n"))))
    return [line.strip() for line in masked.splitlines() if line.strip()]


def check(block: Block, page: Path | str) -> dict[str, Any]:
    """Run a block; what the page says that it prints must be among what it printed."""
    if block.reason:
        pytest.skip(block.reason)
    skip_without_callbacks_of(block.code)
    with recorded() as stream:
        namespace = run(block, page)
    missing = set(lines(block.printed or "")) - set(lines(stream.getvalue()))
    assert not missing, f"{page} line {block.line} does not print {sorted(missing)}, but:\n{stream.getvalue()}"
    return namespace


def configurations(text: str) -> list[str]:
    """The ```yaml blocks of a page."""
    return [found["text"] for found in YAML.finditer(text)]


def callbacks_of(configuration: str, folder: Path, pl: Any) -> Sequence[Any]:
    """The callbacks that LightningCLI of one of the two namespaces makes of a configuration, without running it."""
    from importlib import import_module

    cli, boring = import_module(f"{pl.__name__}.cli"), import_module(f"{pl.__name__}.demos.boring_classes")
    path = folder / "config.yaml"
    path.write_text(configuration)
    made = cli.LightningCLI(
        boring.BoringModel, args=["--config", str(path), "--trainer.logger=false"], run=False, save_config_callback=None
    )
    classes = [
        entry["class_path"].rpartition(".")[2] for entry in yaml.safe_load(configuration)["trainer"]["callbacks"]
    ]
    found = {type(callback).__name__: callback for callback in made.trainer.callbacks}
    return [found[name] for name in classes]
