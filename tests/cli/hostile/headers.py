"""Files of safetensors that are broken, lie, or are something else."""

import os
import pickle
from pathlib import Path

from tests.cli.hostile.writing import Payload, entry, hostile, raw, tensors


@hostile()
def safetensors_of_seven_bytes(folder: Path) -> Path:
    return raw(folder, b"\x08\0\0\0\0\0\0", "file.safetensors")


@hostile()
def header_of_an_exabyte(folder: Path) -> Path:
    return tensors(folder, {}, length=2**60)


@hostile()
def header_longer_than_the_file(folder: Path) -> Path:
    return tensors(folder, {"bn.running_mean": entry([1], 0, 4)}, bytes(4), length=500)


@hostile()
def header_larger_than_any(folder: Path) -> Path:
    path = tensors(folder, {}, length=20 << 20)
    os.truncate(path, 30 << 20)
    return path


@hostile()
def header_that_is_no_json(folder: Path) -> Path:
    return tensors(folder, b"{bn.running_mean: 1}")


@hostile()
def header_that_is_no_text(folder: Path) -> Path:
    return tensors(folder, b'{"\xff\xfe": {}}')


@hostile()
def header_nested_deep(folder: Path) -> Path:
    return tensors(folder, b'{"a":' + b"[" * 100_000)


@hostile()
def overlapping_tensors(folder: Path) -> Path:
    return tensors(folder, {"bn.running_mean": entry([2], 0, 8), "bn.running_var": entry([2], 4, 12)}, bytes(12))


@hostile()
def offsets_beyond_the_file(folder: Path) -> Path:
    return tensors(folder, {"bn.running_mean": entry([2], 0, 8), "bn.running_var": entry([2], 8, 16)}, bytes(12))


@hostile()
def unknown_dtype(folder: Path) -> Path:
    return tensors(folder, {"bn.running_mean": entry([2], 0, 8, dtype="Q77")}, bytes(8))


@hostile()
def shape_that_does_not_fit(folder: Path) -> Path:
    return tensors(folder, {"bn.running_mean": entry([10**12], 0, 8)}, bytes(8))


@hostile()
def shape_below_zero(folder: Path) -> Path:
    return tensors(folder, {"bn.running_mean": entry([-2], 0, 8)}, bytes(8))


@hostile()
def safetensors_without_batch_norm(folder: Path) -> Path:
    return tensors(folder, {"linear.weight": entry([2], 0, 8)}, bytes(8))


@hostile()
def safetensors_cut_off(folder: Path) -> Path:
    path = tensors(folder, {"bn.running_mean": entry([500], 0, 2000), "bn.running_var": entry([500], 2000, 4000)})
    os.truncate(path, path.stat().st_size + 3000)
    return path


@hostile()
def pickle_called_safetensors(folder: Path) -> Path:
    return raw(folder, pickle.dumps(Payload(folder), 2), "file.safetensors")
