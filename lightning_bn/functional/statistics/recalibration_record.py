"""What a recalibrated file says of its recalibration: which layers of which entry, and from how much."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

KEY = "lightning_bn"
"""Of the record: among the outermost keys of a checkpoint, or in the metadata of a safetensors file."""
_FORMAT = 1


class RecalibratedLayer(NamedTuple):
    """One layer, as its statistics were written.

    Attributes:
        total: :func:`total_of` them; where the file has another one, they were replaced since.
        batches: That they are from.
        samples: In these; None where nobody could count them.
    """

    total: float
    batches: int
    samples: int | None


RecalibratedLayers: TypeAlias = dict[str, dict[str, RecalibratedLayer]]
"""By key of the entry, then by the layer's name in it."""


def total_of(mean: Tensor, var: Tensor) -> float:
    """Return one number that other statistics have otherwise: the sum of all values, rounded once; or NaN."""
    values = (one.detach().double().flatten().tolist() for one in (mean, var))
    try:
        return math.fsum(chain.from_iterable(values))
    except (OverflowError, ValueError):  # infinities of both signs, or too large a sum
        return math.nan


def can_hold(content: Mapping[Any, Any]) -> bool:
    """Whether a key beside the others disturbs no reader: not in a state dict, nor among state dicts alone.

    A state dict is loaded with all of its keys, and a file of several may be gone through key by key.
    """
    values = list(content.values())
    if any(isinstance(value, Tensor) for value in values):
        return False
    return isinstance(content.get("state_dict"), Mapping) or not all(isinstance(value, Mapping) for value in values)


def recalibrated_in(content: Mapping[Any, Any], metadata: Mapping[str, str] | None) -> RecalibratedLayers:
    """Return which layers a file says were recalibrated; what is no such record says nothing."""
    said = content.get(KEY)
    if metadata and KEY in metadata:
        with suppress(ValueError, RecursionError):
            said = json.loads(metadata[KEY])
    entries = said.get("recalibrated") if isinstance(said, Mapping) and said.get("format") == _FORMAT else None
    found: RecalibratedLayers = {}
    for key, layers in (entries if isinstance(entries, Mapping) else {}).items():
        for name, values in (layers if isinstance(layers, Mapping) else {}).items():
            if _is_layer(values):
                found.setdefault(str(key), {})[str(name)] = RecalibratedLayer(*values)
    return found


def with_recalibrated(
    content: Mapping[Any, Any], metadata: Mapping[str, str] | None, key: str, layers: Mapping[str, RecalibratedLayer]
) -> dict[str, Any]:
    """Return what is to stand under :data:`KEY`: these layers of an entry, and all others that the file names."""
    known = recalibrated_in(content, metadata)
    known[key] = {**known.get(key, {}), **layers}
    plain = {entry: {name: list(one) for name, one in of.items()} for entry, of in known.items()}
    return {"format": _FORMAT, "recalibrated": plain}


def _is_layer(values: Any) -> bool:
    if not isinstance(values, list | tuple) or len(values) != 3 or not isinstance(values[0], float):
        return False
    batches, samples = values[1:]
    return _is_count(batches) and (samples is None or _is_count(samples))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**62
