"""Which file, or which files by an index, a path or a folder means."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_bn.functional._text import quoted

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
_INDEX = ".index.json"
_MOST_INDEX = 16 << 20


@dataclass(frozen=True)
class Shards:
    """A checkpoint in several files.

    Attributes:
        index: The file that says which tensor is where.
        places: By the name of each tensor, the file that has it.
    """

    index: Path
    places: dict[str, Path]

    @property
    def files(self) -> list[Path]:
        """Those that hold the tensors."""
        return sorted({*self.places.values()})

    def refuse_out(self, out: Path) -> None:
        """Raise where the one file that is to be written of all cannot be told, or is one of them.

        Raises:
            ValueError: Then.
        """
        if out.suffix.lower() not in SUFFIXES:
            whole = self.index.name.split(".")[0] + self.files[0].suffix
            raise ValueError(
                f"{out}: the {len(self.files)} shards of {self.index.name} are written as one file: choose an out= "
                f"that ends with {', '.join(SUFFIXES)}, such as {str(out.with_name(whole))!r}."
            )
        if out.resolve() in {file.resolve() for file in (self.index, *self.files)}:
            raise ValueError(f"{out} is one of the shards of {self.index.name} themselves: choose another out=.")

    def taken(self, names: Collection[str], file: Path, held: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the names that the index says to be in a file, with what it holds.

        Raises:
            ValueError: If it lacks one.
        """
        there = [name for name in names if self.places[name] == file]
        missing = [name for name in there if name not in held]
        if missing:
            raise ValueError(
                f"{self.index.name} says that {missing[0][-160:]!r} is in {file.name}, but it is not: one of the two "
                "files is of another checkpoint."
            )
        return {name: held[name] for name in there}


def named_checkpoint(path: str | Path) -> Path | Shards:
    """Return the file that a path means, or the files: of an index, or of the folder that it is.

    Raises:
        ValueError: If the path is empty, or as for the other functions.
        OSError: As for these.
    """
    if not str(path):
        raise ValueError("the name of the file is empty.")  # and would mean the working folder
    return in_folder(Path(path)) if Path(path).is_dir() else checkpoint_in(Path(path))


def checkpoint_in(path: Path) -> Path | Shards:
    """Return the file itself, or what it says if it is an index.

    Raises:
        ValueError: If it is a broken index.
        OSError: If it cannot be read.
    """
    return _shards(path) if path.name.endswith(_INDEX) else path


def in_folder(folder: Path) -> Path | Shards:
    """Return the one checkpoint in a folder, or in its ``checkpoints``.

    Raises:
        ValueError: If there is none, or several.
        OSError: If the folder cannot be read, or is itself a checkpoint that has to be put together first.
    """
    names = {file.name for file in folder.iterdir()}
    _refuse_parts(folder, names)
    for below in (folder, folder / "checkpoints"):
        if not below.is_dir():
            continue
        files = sorted(file for file in below.iterdir() if not file.is_dir())
        indices = [file for file in files if file.name.endswith(_INDEX)]
        found = indices or [file for file in files if file.suffix.lower() in SUFFIXES]
        if len(found) == 1:
            return checkpoint_in(found[0])
        if found:
            raise ValueError(
                f"{folder} holds {len(found)} checkpoints ({quoted([file.name for file in found])}): name one of them."
            )
    raise ValueError(
        f"{folder} holds no checkpoint: there is no file that ends with {', '.join(SUFFIXES)} or {_INDEX}."
    )


def _refuse_parts(folder: Path, names: set[str]) -> None:
    if ".metadata" in names:
        raise IsADirectoryError(
            f"{folder} is a checkpoint in many parts. Put it into one file with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pt`, or one of Lightning with "
            f"`python -m pytorch_lightning.utilities.consolidate_checkpoint {folder}`."
        )
    if "zero_to_fp32.py" in names:
        raise IsADirectoryError(
            f"{folder} is a checkpoint of DeepSpeed. Put it into one file with `python {folder / 'zero_to_fp32.py'} "
            f"{folder} OUT.pt` if you trust that script."
        )


def _shards(index: Path) -> Shards:
    places = _weight_map(index)
    wrong = [file for file in places.values() if not isinstance(file, str) or Path(file).name != file or file == ".."]
    if wrong:
        raise ValueError(
            f"{index.name} names a file outside of its folder ({str(wrong[0])[:100]!r}), which is not read: put all "
            "shards into the folder of the index."
        )
    for file in {*places.values()}:
        if not (index.parent / file).exists():
            raise FileNotFoundError(
                f"{index.name} names the shard {file!r}, which is not in its folder: copy all files of the checkpoint."
            )
    return Shards(index, {name: index.parent / file for name, file in places.items()})


def _weight_map(index: Path) -> dict[str, Any]:
    if not index.is_file():
        raise FileNotFoundError(f"there is no file {index}.")
    with index.open("rb") as file:
        text = file.read(_MOST_INDEX + 1)
    if len(text) > _MOST_INDEX:
        raise ValueError(f"{index.name} is not an index of shards: it has more than {_MOST_INDEX:,} bytes.")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index.name} is not an index of shards: it is not JSON ({type(error).__name__}).") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index.name} is not an index of shards: it has no 'weight_map' of names and files.")
    return places
