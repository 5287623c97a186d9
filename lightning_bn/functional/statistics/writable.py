"""Where a file can be written, asked before the work that it is for."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_out(out: Path, overwrite: bool) -> None:
    """Raise where nothing may or can be written.

    Raises:
        IsADirectoryError: If ``out`` is a folder.
        FileExistsError: If it exists and ``overwrite`` is not given, or is a device, a pipe or the like.
        NotADirectoryError: If it is below a file.
        PermissionError: If nothing can be written to its folder, or to the one in which that would be made.
    """
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder: name the file to write, for instance {out / 'new.ckpt'}.")
    if out.exists() and not out.is_file():
        raise FileExistsError(f"{out} is no regular file but a device, a pipe or a socket: choose another out=.")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists: choose another out=, or pass overwrite=True to replace it.")
    folder = next(one for one in out.absolute().parents if os.path.lexists(one))
    if not folder.is_dir():
        raise NotADirectoryError(f"{out}: {folder} is not a folder: choose another out=.")
    try:
        # Permissions say less than an attempt: a disk may be read-only.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise PermissionError(f"{out}: nothing can be written to {folder} ({why}): choose another out=.") from error
