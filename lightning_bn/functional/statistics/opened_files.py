"""Checkpoints opened without reading what nobody asks for: the bytes say the format, not the suffix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_bn.functional._text import counted
from lightning_bn.functional.statistics.file_formats import OLD, SAFETENSORS, format_of, size_of
from lightning_bn.functional.statistics.files import read_safetensors, read_torch
from lightning_bn.functional.statistics.shards import Shards, named_checkpoint

PARTS = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
"""Tensors of a BatchNorm layer in a state dict."""


@dataclass(frozen=True)
class OpenedFile:
    """What a checkpoint holds, as far as it is about BatchNorm where the format allows to leave the rest.

    Attributes:
        path: What was named.
        files: What was read: the file itself, or those in a folder.
        kind: Of the files, in words.
        content: The values; of safetensors only those of layers with running statistics.
        size: Of all files that were read, in bytes.
        metadata: The strings that a safetensors file has beside its tensors.
    """

    path: Path
    files: tuple[Path, ...]
    kind: str
    content: dict[Any, Any]
    size: int
    metadata: dict[str, str] = field(default_factory=dict)


def open_checkpoint(path: str | Path) -> OpenedFile:
    """Return what a checkpoint says of BatchNorm; nothing in it is executed.

    Of safetensors only the tensors of layers with running statistics are read. A zip file, as torch.save writes, is
    mapped: values are read when they are looked at. Files of torch before 1.6 are read whole.

    Args:
        path: A file of torch.save or of safetensors, the index of a sharded checkpoint, or a folder that holds one of
            these.

    Raises:
        ValueError: If it is nothing of that kind, is cut off, or says of itself what cannot be.
        OSError: If it cannot be read, or the folder is a checkpoint in many parts that has to be put together first.
        ModuleNotFoundError: If the library of its format is not installed.
        pickle.UnpicklingError: If it holds more than tensors and plain values.
    """
    found, path = named_checkpoint(path), Path(path)
    if isinstance(found, Shards):
        return _open_shards(path, found)
    size = size_of(found)
    kind = format_of(found)
    if kind == SAFETENSORS:
        read = read_safetensors(found, batch_norm_names)
        return OpenedFile(path, (found,), kind, dict(read.content), size, dict(read.metadata or {}))
    return OpenedFile(path, (found,), kind, _dictionary(found, read_torch(found, mmap=kind != OLD)), size)


def batch_norm_names(names: Iterable[str]) -> list[str]:
    """Return which of the names of a state dict belong to layers with running statistics."""
    known = set(names)
    layers = {_layer(name) for name in known if name.rpartition(".")[2] in PARTS[:2]}
    averages = {name for name in known if name.rpartition(".")[2] == "n_averaged"}
    return sorted(known & ({layer + part for layer in layers for part in PARTS} | averages))


def _layer(name: str) -> str:
    return name[: len(name) - len(name.rpartition(".")[2])]


def _open_shards(path: Path, shards: Shards) -> OpenedFile:
    wanted = batch_norm_names(shards.places)
    content: dict[Any, Any] = {}
    files = sorted({shards.places[name] for name in wanted})
    size = sum(map(size_of, files))
    for file in files:
        there = [name for name in wanted if shards.places[name] == file]
        kind = format_of(file)
        if kind == SAFETENSORS:
            held: dict[Any, Any] = read_safetensors(file, {*there}.intersection).content
        else:
            held = _dictionary(file, read_torch(file, mmap=kind != OLD))
        content |= shards.taken(there, file, held)
    kind = f"checkpoint of {counted(len(shards.files), 'shard')}"
    return OpenedFile(path, (shards.index, *files), kind, content, size)


def _dictionary(path: Path, content: Any) -> dict[Any, Any]:
    if isinstance(content, dict):
        return content
    if isinstance(content, list | tuple):  # state dicts of several models
        return dict(enumerate(content))
    raise ValueError(f"{path.name} holds a {type(content).__name__}, not a state dict.")


def shown(name: object, most: int = 160) -> str:
    r"""A name from a file as it may be printed: no control character, and no more than the end of what is long.

    Example:
        >>> shown("layer\x1b[31m.bn")
        'layer\\x1b[31m.bn'
    """
    text = str(name)
    text = text if len(text) <= most else "…" + text[-most:]
    # Half a pair of surrogates cannot be printed either.
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
