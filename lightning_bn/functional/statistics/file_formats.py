"""Which format the bytes of a file are, after a look at whether reading it would need more than it has."""

from __future__ import annotations

import os
import stat
import zipfile
from io import BufferedReader, BytesIO
from pathlib import Path

from lightning_bn.functional.statistics.pickled_calls import check_calls

_MiB = 1 << 20
_MOST_HEADER = 16 * _MiB
"""Of a safetensors file: names and places of some hundred thousand tensors."""
_MOST_PICKLED = 16 * _MiB
"""Of a zip file of torch, without the values of tensors: names and settings."""
SAFETENSORS, ZIP, OLD = "safetensors file", "file of torch.save", "file of torch.save before 1.6"
"""The formats, in words."""


def size_of(path: Path) -> int:
    """Return the bytes of a regular file.

    Raises:
        OSError: If it cannot be read, or is a pipe, a device or the like, which might never end.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise OSError(
            f"{path.name} is not a regular file but a pipe, a socket or a device: save the checkpoint to a file first."
        )
    return about.st_size


def format_of(path: Path) -> str:
    """Return which format the bytes are, after a look at what they say of their own size.

    Raises:
        ValueError: If it is none that is known, one that lies, or one that is made to fill the memory.
        OSError: As for :func:`size_of`.
    """
    size = size_of(path)
    with path.open("rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path.name} is empty (0 bytes): saving it has not begun, or was interrupted.")
    if start[:4] == b"PK\x03\x04":
        _check_zip(path)
        return ZIP
    if start[:1] == b"\x80" and start[8:9] != b"{":
        with path.open("rb") as file:
            check_calls(file, path.name, size, _MOST_PICKLED)
        return OLD
    if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
        _check_header(path, start, size)
        return SAFETENSORS
    raise ValueError(f"{path.name} is not a checkpoint: it does not begin like a file of torch.save or of safetensors.")


def _check_header(path: Path, start: bytes, size: int) -> None:
    header = int.from_bytes(start[:8], "little")
    if len(start) < 9 or header > size - 8 or header > _MOST_HEADER:
        raise ValueError(
            f"{path.name} cannot be read as a file of safetensors: its first 8 bytes say that the header has "
            f"{header:,} bytes, but the file has {size:,}, and at most {_MOST_HEADER:,} are read. It is incomplete, "
            "or another kind of file."
        )


def _check_zip(path: Path) -> None:
    """Refuse what would grow when it is read: torch compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(path, archive.infolist())
            # torch does not tell upper from lower case.
            for one in archive.infolist():
                if one.filename.lower().endswith("data.pkl"):
                    with BufferedReader(BytesIO(archive.read(one))) as file:
                        check_calls(file, path.name, size_of(path), _MOST_PICKLED)
    except (zipfile.BadZipFile, NotImplementedError, IndexError, EOFError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path.name} cannot be read as a file of torch.save: it is incomplete ({error}).") from error


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    if any("/code/" in one.filename for one in entries):
        raise ValueError(
            f"{path.name} cannot be read as a file of torch.save: it is TorchScript, a program. If you trust it, load "
            f"it with torch.jit.load and save its state_dict()."
        )
    grown = [one for one in entries if one.compress_type != zipfile.ZIP_STORED or one.compress_size != one.file_size]
    if grown:
        raise ValueError(
            f"{path.name} is a zip file with compressed entries ({grown[0].filename[:100]!a}), which torch.save "
            f"does not write. If a checkpoint is in it, unpack it first."
        )
    pickled = sum(one.file_size for one in entries if one.filename.lower().endswith(".pkl"))
    if pickled > _MOST_PICKLED:
        raise ValueError(
            f"{path.name} has {pickled:,} bytes beside its tensors, and at most {_MOST_PICKLED:,} are read: names and "
            "settings of a checkpoint are smaller. Save its state dict alone, and name that file."
        )
