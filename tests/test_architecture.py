"""The walks on the page of the architecture are those of the code: each stay exists, none has more than twelve."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FOLDERS = (ROOT / "lightning_bn", ROOT / "lightning_bn" / "functional")
WALKS = re.findall(r"^## (Walk .*?)\n\n```text\n(.*?)^```", PAGE, re.M | re.S)
STAYS = [(*line.split()[1:3],) for _, walk in WALKS for line in walk.splitlines()]
FILES = sorted(set(re.findall(r"`((?:\w+/)*\w+\.py)`", PAGE)))


def find(path: str) -> Path:
    found = [folder / path for folder in FOLDERS if (folder / path).exists()]
    assert len(found) == 1, path
    return found[0]


def test_there_are_three_walks_of_at_most_twelve_stays() -> None:
    assert len(WALKS) == 3
    assert all(len(walk.splitlines()) <= 12 for _, walk in WALKS)


@pytest.mark.parametrize(("file", "name"), STAYS)
def test_each_stay_exists(file: str, name: str) -> None:
    source = find(file).read_text()
    last = name.rpartition(".")[2]
    assert re.search(rf"(def|class) {last}\b|\.{last}\(", source), name


@pytest.mark.parametrize("file", FILES)
def test_each_file_that_is_named_exists(file: str) -> None:
    names = [path for folder in FOLDERS for path in folder.rglob(file.rpartition("/")[2])]
    assert any(path.as_posix().endswith("/" + file) for path in names) or (ROOT / file).exists(), file


def test_rooms_are_the_folders() -> None:
    rooms = {path.parent.name for path in (ROOT / "lightning_bn" / "functional").glob("*/__init__.py")}
    assert {f"`functional/{room}`" for room in rooms} <= set(re.findall(r"`[\w/]+`", PAGE))
