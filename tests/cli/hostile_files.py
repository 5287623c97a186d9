"""Files that are broken, foreign, or made to harm: a function for each, which writes it into a folder."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from argparse import Namespace
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


# Not a checkpoint at all


@hostile()
def missing(folder: Path) -> Path:
    return folder / "file.ckpt"


@hostile()
def empty(folder: Path) -> Path:
    return raw(folder, b"")


@hostile()
def empty_safetensors(folder: Path) -> Path:
    return raw(folder, b"", "file.safetensors")


@hostile()
def text(folder: Path) -> Path:
    return raw(folder, b"epoch,loss\n1,0.3\n")


@hostile()
def page_of_a_failed_download(folder: Path) -> Path:
    return raw(folder, b"<!doctype html><html><body>403 Forbidden</body></html>", "model.pth")


@hostile()
def pointer_of_git_lfs(folder: Path) -> Path:
    return raw(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 102400\n", "m.safetensors")


@hostile()
def random_bytes(folder: Path) -> Path:
    return raw(folder, bytes(range(256)) * 50)


@hostile()
def picture(folder: Path) -> Path:
    return raw(folder, b"\x89PNG\r\n\x1a\n" + bytes(100))


@hostile()
def loop_of_links(folder: Path) -> Path:
    (folder / "a.ckpt").symlink_to(folder / "b.ckpt")
    (folder / "b.ckpt").symlink_to(folder / "a.ckpt")
    return folder / "a.ckpt"


@hostile()
def link_to_nothing(folder: Path) -> Path:
    (folder / "a.ckpt").symlink_to(folder / "gone.ckpt")
    return folder / "a.ckpt"


@hostile()
def pipe_that_nobody_writes_to(folder: Path) -> Path:
    os.mkfifo(folder / "file.ckpt")
    return folder / "file.ckpt"


@hostile()
def device_without_end(folder: Path) -> Path:
    return Path("/dev/zero")


@hostile()
def name_that_is_no_text(folder: Path) -> Path:
    path = os.fsencode(folder) + b"/\xff\xfe.ckpt"
    with open(path, "wb") as file:
        file.write(b"nothing")
    return Path(os.fsdecode(path))


@hostile()
def name_with_a_null(folder: Path) -> Path:
    return folder / "a\0b.ckpt"


# Folders


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


# Zip files and pickles


@hostile()
def zip_cut_in_the_middle(folder: Path) -> Path:
    path = saved(folder, layer(1000))
    os.truncate(path, path.stat().st_size // 2)
    return path


@hostile()
def zip_without_its_end(folder: Path) -> Path:
    path = saved(folder, layer())
    os.truncate(path, path.stat().st_size - 10)
    return path


@hostile()
def zip_of_four_bytes(folder: Path) -> Path:
    return raw(folder, b"PK\x03\x04")


@hostile()
def zip_of_something_else(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "file.ckpt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    return folder / "file.ckpt"


@hostile()
def zip_that_is_compressed(folder: Path) -> Path:
    return zipped(folder, pickle.dumps({}, 2), zipfile.ZIP_DEFLATED)


@hostile()
def zip_bomb(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "file.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (30 << 20))
    return folder / "file.ckpt"


@hostile()
def zip_with_a_pickle_beyond_bounds(folder: Path) -> Path:
    return zipped(folder, b"\x80\x02" + b"]" * (17 << 20) + b".")


@hostile()
def zip_with_lists_in_lists(folder: Path) -> Path:
    return zipped(folder, b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")


@hostile()
def zip_that_claims_other_sizes(folder: Path) -> Path:
    path = saved(folder, layer())
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 20 : place + 28] = struct.pack("<II", 10, 2**31)
    path.write_bytes(content)
    return path


@hostile()
def torchscript(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "file.ckpt", "w") as archive:
        archive.writestr("file/constants.pkl", pickle.dumps((), 2))
        archive.writestr("file/data.pkl", pickle.dumps({}, 2))
        archive.writestr("file/code/__torch__.py", "import os\n")
        archive.writestr("file/version", "3\n")
    return folder / "file.ckpt"


@hostile()
def old_pickle_that_runs_a_command(folder: Path) -> Path:
    return raw(folder, pickle.dumps({"state_dict": Payload(folder)}, 2))


@hostile()
def zip_that_runs_a_command(folder: Path) -> Path:
    return zipped(folder, pickle.dumps({"state_dict": Payload(folder)}, 2))


@hostile()
def zip_that_evaluates(folder: Path) -> Path:
    return zipped(folder, pickle.dumps(Evaluated(folder), 2))


@hostile()
def zip_with_an_object(folder: Path) -> Path:
    return saved(folder, {"state_dict": layer(), "hyper_parameters": Namespace(lr=0.1)})


@hostile()
def zip_that_wants_a_terabyte(folder: Path) -> Path:
    return zipped(folder, b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.")


@hostile()
def old_pickle_cut_off(folder: Path) -> Path:
    path = saved(folder, layer(1000), _use_new_zipfile_serialization=False)
    os.truncate(path, path.stat().st_size // 2)
    return path


@hostile()
def pickle_of_a_number(folder: Path) -> Path:
    return saved(folder, 7)


@hostile()
def pickle_of_text(folder: Path) -> Path:
    return saved(folder, "state_dict")


@hostile()
def pickle_without_an_end(folder: Path) -> Path:
    return raw(folder, b"\x80\x02}q\x00")


# State dicts that are none


@hostile()
def cyclic_dictionary(folder: Path) -> Path:
    content: dict[str, Any] = {"a": {}}
    for number in range(300):
        content["a"][f"again{number}"] = content
    content["a"]["itself"] = content["a"]
    return saved(folder, content)


@hostile()
def nested_deep(folder: Path) -> Path:
    content: Any = layer()
    for _ in range(200):
        content = {"inner": content}
    return saved(folder, content)


@hostile()
def nested_wide(folder: Path) -> Path:
    shared: Any = {}
    for _ in range(30):
        shared = {"left": shared, "right": shared, "again": [shared] * 20}
    return saved(folder, shared)


@hostile()
def keys_that_are_no_text(folder: Path) -> Path:
    return saved(folder, {0: torch.ones(3), None: {1.5: torch.ones(2), (1, 2): {True: torch.ones(1)}}})


@hostile()
def no_batch_norm(folder: Path) -> Path:
    return saved(folder, nn.Linear(2, 2).state_dict())


@hostile()
def values_that_are_no_tensors(folder: Path) -> Path:
    return saved(folder, {"bn.running_mean": [0.0, 0.0], "bn.running_var": "one", "bn.weight": None})


@hostile(1)
def mean_without_variance(folder: Path) -> Path:
    return state(folder, running_var=None)


@hostile(1)
def variance_without_mean(folder: Path) -> Path:
    return state(folder, running_mean=None)


@hostile(1)
def different_sizes(folder: Path) -> Path:
    return state(folder, running_var=torch.ones(5))


@hostile()
def two_dimensions(folder: Path) -> Path:
    return state(folder, running_mean=torch.zeros(2, 2), running_var=torch.ones(2, 2))


@hostile()
def no_dimension(folder: Path) -> Path:
    return state(folder, running_mean=torch.tensor(0.0), running_var=torch.tensor(1.0))


@hostile()
def no_channels(folder: Path) -> Path:
    return state(folder, running_mean=torch.zeros(0), running_var=torch.ones(0), weight=None, bias=None)


@hostile(1)
def meta_tensors(folder: Path) -> Path:
    return state(folder, running_mean=torch.zeros(4, device="meta"), running_var=torch.ones(4, device="meta"))


@hostile(1)
def sparse_tensors(folder: Path) -> Path:
    return state(folder, running_mean=torch.ones(4).to_sparse())


@hostile(1)
def quantized_tensors(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch gives such tensors up
        return state(folder, running_mean=torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))


@hostile(1)
def complex_tensors(folder: Path) -> Path:
    return state(folder, running_mean=torch.ones(4, dtype=torch.complex64))


@hostile()
def lazy_layer(folder: Path) -> Path:
    return saved(folder, {"bn.running_mean": nn.parameter.UninitializedBuffer(), "bn.running_var": torch.ones(4)})


@hostile()
def billion_channels_of_four_bytes(folder: Path) -> Path:
    one = torch.ones(1).expand(10**9)
    return saved(folder, {"bn.running_mean": one, "bn.running_var": one})


@hostile()
def many_names_for_more_than_any_network_has(folder: Path) -> Path:
    path = folder / "file.safetensors"
    size = 4 * (9 << 20)
    header = {"bn.running_mean": entry([9 << 20], 0, size), "bn.running_var": entry([9 << 20], size, 2 * size)}
    tensors(folder, header)
    os.truncate(path, path.stat().st_size + 2 * size)
    return path


@hostile(0)
def counter_that_is_none(folder: Path) -> Path:
    return state(folder, num_batches_tracked=torch.tensor(float("nan")))


@hostile(0)
def counter_of_many(folder: Path) -> Path:
    return state(folder, num_batches_tracked=torch.tensor([-1, 2, 3]))


@hostile(0)
def weight_of_another_layer(folder: Path) -> Path:
    return state(folder, weight=torch.ones(3, 3))


@hostile(0)
def names_that_paint_the_terminal(folder: Path) -> Path:
    return saved(folder, {name.replace("bn.", "\x1b[31m\r\nbn\x00."): value for name, value in layer().items()})


@hostile(0)
def name_of_a_hundred_thousand(folder: Path) -> Path:
    return saved(folder, {name.replace("bn.", "a" * 100_000 + "."): value for name, value in layer().items()})


@hostile(0)
def name_with_half_a_character(folder: Path) -> Path:
    return saved(folder, {name.replace("bn.", "\ud800."): value for name, value in layer().items()})


@hostile(0)
def callbacks_that_lie(folder: Path) -> Path:
    callbacks: dict[Any, Any] = {
        "BatchNormFreezer": {"report": {"layers": 7, "violations": [[]]}},
        "BatchNormMonitor": {"reference": {"names": ["a"], "channels": "b"}, "history": []},
        "PreciseBatchNorm": {"done_at_step": "never"},
        "TaskBatchNorm": {"sets": 3, "tasks": None, "default": {}, "layers": 1},
        0: "zero",
    }
    callbacks["BatchNormFreezer[itself]"] = callbacks
    return saved(folder, {"state_dict": layer(), "callbacks": callbacks, "epoch": [], "global_step": "\x1b[2J"})


# safetensors


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
