"""What the doctor found: a mistake or an advice, with its layers, why it hurts, and the line that mends it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Severity: TypeAlias = Literal["fault", "advice"]


@dataclass(frozen=True)
class Finding:
    """One mistake of a model or its training, or an advice.

    Attributes:
        rule: Which rule found it.
        severity: ``"fault"``: results suffer; ``"advice"``: true, and mostly harmless.
        layers: Canonical names of the modules that have it, in registration order.
        what: What is so, in one sentence.
        why: What that does to the results.
        remedy: The lines of Python that mend it; what is to be done by hand is a comment in them.
        yaml: What to write into the YAML file of a LightningCLI instead; empty where that does not mend it.
    """

    rule: str
    severity: Severity
    layers: tuple[str, ...]
    what: str
    why: str
    remedy: str
    yaml: str = ""

    def __str__(self) -> str:
        do = self.remedy.replace("\n", "\n       ")
        return f"{self.severity}: {self.what}\n  why: {self.why}\n  do:  {do}"

    def as_dict(self) -> dict[str, Any]:
        """Return it as a dict of strings and one list."""
        return {**asdict(self), "layers": list(self.layers)}
