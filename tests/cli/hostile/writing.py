"""How files that are broken, foreign, or made to harm are written into a folder, and the list of them."""

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

MARK = "executed"
"""The file that a payload makes if it is executed."""

FILES: dict[str, tuple[Callable[[Path], Path], int]] = {}
"""By name: what writes the file, and the exit code of ``inspect``."""


def hostile(code: int = 2) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """List a function."""

    def listed(write: Callable[[Path], Path]) -> Callable[[Path], Path]:
        FILES[write.__name__] = write, code
        return write

    return listed


def raw(folder: Path, content: bytes, name: str = "file.ckpt") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def saved(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "file.ckpt", **options)
    return folder / "file.ckpt"


def layer(channels: int = 4, **others: Any) -> dict[str, Any]:
    """State of a BatchNorm layer that is well, under "bn"."""
    one = nn.BatchNorm1d(channels)
    for _ in range(100):
        one(torch.randn(16, channels))
    return {**{f"bn.{name}": value.detach() for name, value in one.state_dict().items()}, **others}


def state(folder: Path, **changed: Any) -> Path:
    """A file with one layer of which some tensors were changed, or taken out by None."""
    content = layer() | {f"bn.{name}": value for name, value in changed.items()}
    return saved(folder, {name: value for name, value in content.items() if value is not None})


def zipped(folder: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save with another pickle in it."""
    buffer = io.BytesIO()
    torch.save(layer(), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(folder / "file.ckpt", "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, pickled if entry.filename.endswith(".pkl") else old.read(entry))
    return folder / "file.ckpt"


def tensors(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file as safetensors has it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    return raw(folder, size + text + data, "file.safetensors")


def entry(shape: list[int], *offsets: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.folder / MARK}",)


class Evaluated(Payload):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.folder / MARK)!r}, 'w')",)
