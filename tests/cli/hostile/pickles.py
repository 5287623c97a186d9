"""Files of torch.save that are broken or made to harm."""

import os
import pickle
import struct
import zipfile
from argparse import Namespace
from pathlib import Path

from tests.cli.hostile.writing import Evaluated, Payload, hostile, layer, raw, saved, zipped


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
