"""Checkpoints as files: one reader, which executes nothing, and one writer, where the suffix says the format."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bn.functional._text import quoted
from lightning_bn.functional.statistics.claimed_values import check_claim, unlike
from lightning_bn.functional.statistics.file_entries import DEEPEST, FileEntry, Shapes, find_entry, state_dicts_in
from lightning_bn.functional.statistics.file_formats import SAFETENSORS, format_of
from lightning_bn.functional.statistics.recalibration_record import KEY, RecalibratedLayer, can_hold, with_recalibrated
from lightning_bn.functional.statistics.shards import Shards, named_checkpoint
from lightning_bn.functional.statistics.snapshots import Snapshot
from lightning_bn.functional.statistics.writable import complete


@dataclass(frozen=True)
class CheckpointFile:
    """What a file holds, on the CPU.

    Attributes:
        path: Where it was read from; of a checkpoint in several files, their index.
        content: All of it, as saved; what is written into it is written by :meth:`write`.
        metadata: The strings that a safetensors file has beside its tensors.
        shards: Of a checkpoint in several files; None for one.
    """

    path: Path
    content: dict[str, Any]
    metadata: dict[str, str] | None = None
    shards: Shards | None = None

    def entry(self, wanted: Shapes, of: str, **choice: str | None) -> FileEntry:
        """As :func:`~lightning_bn.functional.statistics.file_entries.find_entry`."""
        return find_entry(self.content, wanted, f"{self.path.name} does not fit {of}", **choice)

    def refuse_format(self, out: Path) -> None:
        """Raise where ``out`` has a format that cannot hold the content.

        Raises:
            ValueError: If it has not, if what comes in several files has no suffix of a checkpoint to be written to, or
                if ``out`` is one of these files.
            ModuleNotFoundError: If the library of that format is not installed.
        """
        if self.shards is not None:
            self.shards.refuse_out(out)
        if not _is_safetensors(out):
            return
        _safetensors(out)
        others = [name for name, value in self.content.items() if not isinstance(value, Tensor)]
        if others:
            renamed = self.shards or _is_safetensors(self.path) or not self.path.suffix
            raise ValueError(
                f"{out.name}: a safetensors file holds tensors only, and {self.path.name} has more ({quoted(others)}). "
                f"Choose an out= with another suffix, such as {'.pt' if renamed else self.path.suffix!r}."
            )

    def recalibrated(self, key: str, layers: Mapping[str, RecalibratedLayer], out: Path) -> CheckpointFile:
        """The same with a record of a recalibration, where ``out`` has a place for one that disturbs no reader.

        Args:
            key: Of the entry.
            layers: Of it, by their names in it.
            out: Where it is to be written.
        """
        record = with_recalibrated(self.content, self.metadata, key, layers)
        if _is_safetensors(out):
            return replace(self, metadata={"format": "pt", **(self.metadata or {}), KEY: json.dumps(record)})
        return replace(self, content={**self.content, KEY: record}) if can_hold(self.content) else self

    def write(self, out: Path) -> None:
        """Write all of it to ``out``, which appears when it is complete; its folder is made.

        Links and the permissions of a file that is replaced stay.

        Raises:
            ValueError: As for :meth:`refuse_format`.
            OSError: If it cannot be written.
        """
        self.refuse_format(out)
        with complete(out) as part:
            if _is_safetensors(out):
                # Copies, since the format refuses tensors that share memory, as tied weights do.
                tensors = {name: value.contiguous().clone() for name, value in self.content.items()}
                _safetensors(out).save_file(tensors, part, self.metadata or {"format": "pt"})
            else:
                torch.save(self.content, part)


def read_checkpoint(path: str | Path) -> CheckpointFile:
    """Return what a checkpoint holds, on the CPU; nothing in the file is executed.

    Args:
        path: A file of torch or of safetensors, as its bytes say; the index of a checkpoint in several of these
            (``model.safetensors.index.json``); or a folder that holds one of all these.

    Raises:
        ValueError: If it is no checkpoint, is cut off, or holds no state dict.
        IsADirectoryError: If it is a folder that is itself a checkpoint in many parts, to be put together first.
        ModuleNotFoundError: If the library of its format is not installed.
        pickle.UnpicklingError: If it holds more than tensors and plain values.
    """
    found = named_checkpoint(path)
    read = _read_shards(found) if isinstance(found, Shards) else _read_file(found)
    if not state_dicts_in(read.content):
        raise ValueError(
            f"{read.path.name} holds no state dict: neither the file itself nor one of its entries is a state "
            f"dict, up to {DEEPEST} keys one inside the other."
        )
    return read


def _read_file(path: Path) -> CheckpointFile:
    return read_safetensors(path) if format_of(path) == SAFETENSORS else _read_dictionary(path)


def _read_shards(shards: Shards) -> CheckpointFile:
    content: dict[str, Any] = {}
    metadata: dict[str, str] | None = None
    for file in shards.files:
        read = _read_file(file)
        metadata = metadata or read.metadata
        content |= shards.taken(shards.places, file, read.content)
    return CheckpointFile(shards.index, {name: content[name] for name in shards.places}, metadata, shards)


def read_torch(path: Path, mmap: bool = False) -> Any:
    """Return what a file of torch.save holds, on the CPU; nothing in the file is executed.

    Args:
        path: The file.
        mmap: Whether tensors stay in the file until they are looked at. Not for files of torch before 1.6.

    Raises:
        ValueError: If it is no such file, or is cut off.
        pickle.UnpicklingError: If it holds more than tensors and plain values.
    """
    try:
        if _is_safetensors(path):  # newer versions of torch go by the suffix, and what is no path cannot be mapped
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:
        # Of all that torch says, what is refused; its other sentences are about weights_only, with escape codes.
        kind = re.search(r"GLOBAL (\S+)", str(error))
        if kind:
            raise pickle.UnpicklingError(
                f"{path.name} holds objects besides tensors and plain values ({kind[1]}), and to read those would "
                "execute code: if you trust the file, load it yourself, save its state dict alone, and pass that."
            ) from error
        first = re.sub(r"\x1b\[\d*m", "", str(error)).strip().partition("\n")[0]
        # Not its advice to execute what is in the file.
        why = "" if "weights_only" in first else first
        raise ValueError(
            f"{path.name} cannot be read as a file of torch.save: it is another kind of file, or incomplete "
            f"({type(error).__name__}{': ' * bool(why)}{why})."
        ) from error


def _read_dictionary(path: Path) -> CheckpointFile:
    content = read_torch(path)
    return CheckpointFile(path, content if isinstance(content, dict) else {})


def read_safetensors(path: Path, wanted: Callable[[list[str]], Iterable[str]] | None = None) -> CheckpointFile:
    """Return tensors of a safetensors file, on the CPU.

    Args:
        path: The file.
        wanted: Chooses among the names of all of them those that are read and copied, and no others; None takes all,
            which stay in the file until they are looked at.

    Raises:
        ValueError: If it is no such file, is cut off, or what is to be copied is more than any network has.
        FileNotFoundError: If there is none.
        ModuleNotFoundError: If the library of the format is not installed.
    """
    _safetensors(path)
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            if wanted is None:
                return CheckpointFile(path, {name: file.get_tensor(name) for name in names}, file.metadata())
            chosen = list(wanted(names))
            check_claim(sum(map(_bytes_of, map(file.get_slice, chosen))), path.stat().st_size)
            # Copies, since of a mapped file the pages around each tensor count as memory too, until the file is closed.
            return CheckpointFile(path, {name: file.get_tensor(name).clone() for name in chosen}, file.metadata())
    except SafetensorError as error:
        raise ValueError(f"{path.name} cannot be read as a file of safetensors: {error}.") from error


def _bytes_of(tensor: Any) -> int:
    """Of a tensor of safetensors that has not been read."""
    bits = re.match(r"[A-Z]+(\d+)", tensor.get_dtype())
    values: int = math.prod(tensor.get_shape())
    return values * (int(bits[1]) // 8 if bits else 1)


def _is_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def _safetensors(path: Path) -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path.name}: this format needs the safetensors package: pip install 'lightning-bn[safetensors]'."
        ) from None
    return safetensors.torch


def snapshot_of_checkpoint(
    path: str | Path, like: Snapshot, *, key: str | None = None, prefix: str | None = None
) -> tuple[Snapshot, FileEntry]:
    """Return the running statistics that a checkpoint holds of the layers of a snapshot, and where in it they are.

    Args:
        path: As for :func:`read_checkpoint`.
        like: Says which layers, and has what a checkpoint lacks (``eps``).
        key: As for :func:`~lightning_bn.functional.statistics.file_entries.find_entry`.
        prefix: As for ``find_entry``.

    Raises:
        ValueError: As for ``read_checkpoint``, or if the file lacks a layer or has it with other channels.
        OSError: As for ``read_checkpoint``.
        pickle.UnpicklingError: As for ``read_checkpoint``.
    """
    return snapshot_in(read_checkpoint(path), like, key=key, prefix=prefix)


def snapshot_in(
    file: CheckpointFile, like: Snapshot, *, key: str | None = None, prefix: str | None = None
) -> tuple[Snapshot, FileEntry]:
    """As :func:`snapshot_of_checkpoint`, of a file that has been read."""
    sizes = dict(zip(like.names, like.layout.sizes, strict=True))
    wanted = {
        _join(name, value): torch.Size((size,))
        for name, size in sizes.items()
        for value in ("running_mean", "running_var")
    }
    entry = file.entry(wanted, "the BatchNorm layers", key=key, prefix=prefix)

    def gather(value: str) -> Tensor:
        values = [entry[_join(name, value)] for name in like.names]
        for name, one in zip(like.names, values, strict=True):
            if (why := unlike(one, like.mean)) is not None:
                raise ValueError(f"{file.path.name}: {_join(name, value)!r} {why}.")
        # A model in half precision is measured from what the file holds, not from what that model could.
        dtype = reduce(torch.promote_types, (one.dtype for one in values), like.mean.dtype)
        return torch.cat([one.to(dtype) for one in values])

    counters = [entry.get(_join(name, "num_batches_tracked"), torch.tensor(-1)) for name in like.names]
    read = replace(
        like, mean=gather("running_mean"), var=gather("running_var"), num_batches_tracked=torch.stack(counters)
    )
    return read.to(like.mean.device), entry


def _join(name: str, value: str) -> str:
    return f"{name}.{value}" if name else value
