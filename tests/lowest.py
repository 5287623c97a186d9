"""The lowest versions that pyproject.toml states, as constraints for pip: `make test-oldest` installs these."""

import re
import sys
from pathlib import Path

# As text: this runs in an interpreter of Python 3.10 that has nothing installed, and that cannot read TOML.
STATED = re.compile(r'"([A-Za-z][\w-]*)(?:\[[\w,]+\])?>=([\d.]+)[^"]*"')


def lowest(pyproject: str) -> dict[str, str]:
    """Version by distribution, of each requirement with a lower bound."""
    return dict(STATED.findall(pyproject))


if __name__ == "__main__":
    versions = lowest((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    sys.stdout.writelines(f"{name}=={version}\n" for name, version in sorted(versions.items()))
