"""Paths that lead to no checkpoint."""

import os
from pathlib import Path

from tests.cli.hostile.writing import hostile, raw


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
