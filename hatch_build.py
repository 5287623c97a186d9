"""The long description: README.md without its relative links, which lead nowhere outside the repository."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = r"\((?!https?://|mailto:)[^)\s]*\)"
PICTURE = re.compile(rf"!\[[^\]]*\]{RELATIVE}\n*")
LINK = re.compile(rf"\[([^\]]*)\]{RELATIVE}")


def without_relative_links(text: str) -> str:
    """Return a page whose relative links are their text only, without the pictures that lie beside it."""
    return LINK.sub(r"\1", PICTURE.sub("", text))


class LongDescription(MetadataHookInterface):
    """Sets ``readme``, which pyproject.toml names as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called with the ``[project]`` table before anything is built."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": without_relative_links(text)}
