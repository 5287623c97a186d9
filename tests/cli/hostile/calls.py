"""Files of torch.save whose calls would fill the memory: each function called is one that torch lets a file call."""

import codecs
import collections
import pickle
from pathlib import Path
from typing import Any

import torch

from tests.cli.hostile.writing import hostile, saved, zipped


class Call:
    """Calls something when it is unpickled."""

    def __init__(self, *called: Any) -> None:
        self.called = called

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called[0], self.called[1:]


def endless() -> torch.Tensor:
    """A hundred million values, of which one is saved."""
    return torch.zeros(1).expand(100_000_000)


@hostile()
def bytes_by_their_number(folder: Path) -> Path:
    return saved(folder, {"a": Call(bytearray, 1_000_000_000)})


@hostile()
def bytes_by_their_number_before_1_6(folder: Path) -> Path:
    return saved(folder, {"a": Call(bytearray, 1_000_000_000)}, _use_new_zipfile_serialization=False)


@hostile()
def bytes_by_their_number_as_a_tensor(folder: Path) -> Path:
    rebuild = torch._tensor._rebuild_from_type_v2
    return saved(folder, {"a": Call(rebuild, bytearray, torch.Tensor, (1_000_000_000,), {})})


@hostile()
def bytes_doubled_again_and_again(folder: Path) -> Path:
    doubled = Call(codecs.encode, "a" * 1000, "latin1")
    for _ in range(20):
        doubled = Call(codecs.encode, doubled, "hex")
    return saved(folder, {"a": doubled})


@hostile()
def bytes_of_the_same_text(folder: Path) -> Path:
    text = "a" * 1_000_000
    return saved(folder, [Call(bytearray, text, "latin-1") for _ in range(1000)])


@hostile()
def set_of_a_tensor_without_end(folder: Path) -> Path:
    return saved(folder, {"a": Call(set, endless())})


@hostile()
def pairs_that_are_a_tensor_without_end(folder: Path) -> Path:
    return saved(folder, {"a": Call(collections.OrderedDict, [endless()])})


class Storage:
    """Of a billion values, as files of torch before 1.6 announce one."""


class Announcing(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", 10**9, None) if isinstance(value, Storage) else None


@hostile()
def tensors_that_are_not_in_the_file(folder: Path) -> Path:
    path = saved(folder, {}, _use_new_zipfile_serialization=False)
    rebuild = torch._utils._rebuild_tensor_v2
    tensor = Call(rebuild, Storage(), 0, (10**9,), (1,), False, collections.OrderedDict())
    with path.open("rb") as file:
        for _ in range(3):  # what all such files begin with
            pickle.load(file)
        start = path.read_bytes()[: file.tell()]
    with path.open("wb") as file:
        file.write(start)
        Announcing(file, 2).dump({"a": Call(set, tensor)})
        pickle.dump(["0"], file, 2)
    return path


@hostile()
def tensor_without_end_in_another_type(folder: Path) -> Path:
    convert = torch._utils._rebuild_device_tensor_from_cpu_tensor
    return saved(folder, {"a": Call(convert, endless(), torch.float64, "cpu", False)})


@hostile()
def key_of_tuples_in_tuples(folder: Path) -> Path:
    return zipped(folder, b"\x80\x02}K\x01\x85" + b"q\0h\0\x86" * 40 + b"K\x01s.")
