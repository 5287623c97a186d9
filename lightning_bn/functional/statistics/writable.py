"""Where a file can be written, asked before the work that it is for; and how, so that it is whole or not there."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def check_out(path: str | Path, overwrite: bool) -> None:
    """Raise where nothing may or can be written.

    Raises:
        IsADirectoryError: If it is a folder, or written as one, with a slash at the end.
        FileExistsError: If it exists and ``overwrite`` is not given, or is a device, a pipe or the like, or a link to
            itself.
        NotADirectoryError: If it is below a file.
        PermissionError: If nothing can be written to its folder, or to the one in which that would be made.
    """
    out = Path(path)
    if out.is_dir() or str(path).endswith(os.sep):
        raise IsADirectoryError(f"{out} is a folder: name the file to write, for instance {out / 'new.ckpt'}.")
    there = _behind_links(out)
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another out=, or pass overwrite=True to replace it.")
    folder = next(one for one in there.absolute().parents if os.path.lexists(one))
    if not folder.is_dir():
        raise NotADirectoryError(f"{out}: {folder} is not a folder: choose another out=.")
    try:
        # Permissions say less than an attempt: a disk may be read-only.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise PermissionError(f"{out}: nothing can be written to {folder} ({why}): choose another out=.") from error


@contextmanager
def complete(out: Path) -> Iterator[Path]:
    """Inside, a new file, which takes the place of ``out`` at the end, with its permissions; its folder is made.

    If ``out`` is a link, it stays, and what it leads to is replaced. After an exception nothing is.

    Raises:
        FileExistsError: If it is a device, a pipe or the like, or a link to itself.
    """
    there = _behind_links(out)
    there.parent.mkdir(parents=True, exist_ok=True)
    part = there.with_name(f".{there.name[:200]}.{os.getpid()}.part")
    try:
        # What only its owner may read is read by nobody else on the way either.
        part.touch(0o600 if there.exists() else 0o666)
        like = there if there.exists() else part
        permissions = stat.S_IMODE(like.stat().st_mode)
        yield part
        with suppress(PermissionError):  # a file system without permissions; nothing is open to more readers for it
            part.chmod(permissions)  # safetensors writes files that nobody else may read
        os.replace(part, there)
    finally:
        part.unlink(missing_ok=True)


def _behind_links(out: Path) -> Path:
    """Where a link leads, or ``out`` itself.

    Raises:
        FileExistsError: If there is what is no regular file, or a link leads to itself.
    """
    there = Path(os.path.realpath(out)) if out.is_symlink() else out
    if there.is_symlink():
        raise FileExistsError(f"{out} is a link that leads to itself: choose another out=.")
    if there.exists() and not there.is_file():
        raise FileExistsError(f"{out} is not a regular file but a device, a pipe or a socket: choose another out=.")
    return there
