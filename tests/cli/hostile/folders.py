"""Folders and indices of shards that hold no checkpoint."""

import os
from pathlib import Path

from tests.cli.hostile.writing import entry, hostile, raw, tensors


@hostile()
def empty_folder(folder: Path) -> Path:
    return folder


@hostile()
def folder_of_several(folder: Path) -> Path:
    raw(folder, b"", "a.ckpt")
    raw(folder, b"", "b.ckpt")
    return folder


@hostile()
def folder_that_holds_itself(folder: Path) -> Path:
    (folder / "checkpoints").symlink_to(folder)
    return folder


@hostile()
def folder_in_many_parts(folder: Path) -> Path:
    raw(folder, b"", ".metadata")
    return folder


@hostile()
def folder_of_deepspeed(folder: Path) -> Path:
    raw(folder, b"import os\nos.system('touch executed')\n", "zero_to_fp32.py")
    return folder


def index(folder: Path, content: bytes) -> Path:
    return raw(folder, content, "model.safetensors.index.json")


@hostile()
def index_that_is_no_json(folder: Path) -> Path:
    return index(folder, b"{weight_map")


@hostile()
def index_of_another_kind(folder: Path) -> Path:
    return index(folder, b'{"weight_map": ["bn.running_mean"]}')


@hostile()
def index_nested_deep(folder: Path) -> Path:
    return index(folder, b"[" * 100_000)


@hostile()
def index_that_leads_outside(folder: Path) -> Path:
    return index(folder, b'{"weight_map": {"bn.running_mean": "../../../etc/passwd"}}')


@hostile()
def index_without_its_shards(folder: Path) -> Path:
    return index(folder, b'{"weight_map": {"bn.running_mean": "model-1.safetensors"}}')


@hostile()
def index_that_lies(folder: Path) -> Path:
    tensors(folder, {"x": entry([1], 0, 4)}, bytes(4)).rename(folder / "model-1.safetensors")
    return index(folder, b'{"weight_map": {"bn.running_mean": "model-1.safetensors"}}')


@hostile()
def index_of_a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "model-1.safetensors")
    return index(folder, b'{"weight_map": {"bn.running_mean": "model-1.safetensors"}}')


@hostile()
def index_larger_than_any(folder: Path) -> Path:
    path = index(folder, b"")
    os.truncate(path, 20 << 20)
    return path
