"""What is written takes the place of what was there, and of nothing else."""

import os
import stat
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_bn.functional import recalibrate_checkpoint
from lightning_bn.functional.statistics.files import read_checkpoint


@pytest.fixture
def old(tmp_path: Path) -> Path:
    torch.save(nn.BatchNorm1d(2).state_dict(), tmp_path / "old.pt")
    return tmp_path / "old.pt"


def recalibrated(path: Path, out: Path, overwrite: bool = True) -> None:
    recalibrate_checkpoint(path, nn.BatchNorm1d(2), [torch.randn(8, 2) + 5], out, overwrite=overwrite)
    assert read_checkpoint(out).content["running_mean"].min() > 3


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o400, 0o664])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_permissions_stay(old: Path, permissions: int, suffix: str) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    out = old.with_name(f"out{suffix}")
    recalibrated(old, out)
    assert mode(out) == mode(old)
    out.chmod(permissions)
    recalibrated(old, out)
    assert mode(out) == permissions


def test_a_file_system_without_permissions_is_written_to(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    old.chmod(0o640)
    monkeypatch.setattr(Path, "chmod", refused)
    recalibrated(old, old)
    assert mode(old) & ~0o640 == 0


def test_a_link_stays_and_what_it_leads_to_is_replaced(old: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    link = tmp_path / "sub" / "link.pt"
    link.symlink_to(old)
    with pytest.raises(FileExistsError):
        recalibrated(old, link, overwrite=False)
    recalibrated(old, link)
    assert link.is_symlink()
    assert not old.is_symlink()
    assert read_checkpoint(old).content["running_mean"].min() > 3
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link.pt", "old.pt", "sub"]


def test_a_link_to_nothing_stays_and_leads_to_the_new_file(old: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.pt"
    link.symlink_to("new.pt")
    recalibrated(old, link, overwrite=False)
    assert link.is_symlink()
    assert (tmp_path / "new.pt").is_file()


def test_links_in_a_circle_and_what_is_no_file_are_left(old: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "piped").symlink_to("pipe")
    for name, why in {"a": "leads to itself", "pipe": "not a regular file", "piped": "not a regular file"}.items():
        with pytest.raises(FileExistsError, match=why):
            recalibrated(old, tmp_path / name)
        with pytest.raises(FileExistsError, match=why):
            read_checkpoint(old).write(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "old.pt", "pipe", "piped"]
    assert (tmp_path / "a").is_symlink()
