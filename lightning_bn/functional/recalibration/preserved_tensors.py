"""Buffers, weights and gradients that are afterwards what they were before: objects, forms and bits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bn.functional._bits import Flat, is_plain
from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.properties import is_lazy
from lightning_bn.functional.layers.torch_private import buffers_of, parameters_of
from lightning_bn.functional.recalibration.result import WeightsMovedError


@contextmanager
def preserved_tensors(modules: Mapping[nn.Module, str], also: Collection[dict[str, Any]] = ()) -> Iterator[None]:
    """Put back at the end all buffers, weights and gradients; costs a copy of buffers and weights.

    Of sparse ones the objects are put back.

    Args:
        modules: Whose own ones are meant, with their names.
        also: Further dictionaries of tensors, which are put back as buffers are.

    Raises:
        WeightsMovedError: At the end, if a weight that requires a gradient was written to or replaced. Others, such as
            a teacher's, are put back and nothing is said.
    """
    parameters, buffers = _Contents(map(parameters_of, modules)), _Contents([*map(buffers_of, modules), *also])
    weights = parameters.tensors()
    copies, gradients = _Copies((weights | buffers.tensors()).values()), [weight.grad for weight in weights.values()]
    # A backward inside the forward begins its own gradients.
    for weight, gradient in zip(weights.values(), gradients, strict=True):
        if gradient is not None:
            weight.grad = None
    try:
        yield
    finally:
        moved = parameters.put_back()
        buffers.put_back()
        # Before the gradients: one fits its weight only in the form that this had.
        moved |= copies.put_back()
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            if weight.grad is not gradient:
                weight.grad = gradient
    trained = [
        f"{prefix}.{name}".removeprefix(".")
        for prefix, own in (zip(modules.values(), parameters.each(), strict=True) if moved else ())
        for name, weight in own
        if id(weight) in moved and weight is not None and weight.requires_grad
    ]
    if trained:
        raise WeightsMovedError(
            f"the forward writes to the trained weight{'s' * (len(trained) > 1)} {quoted(trained)}, which would "
            "change the training: the old values were restored, and nothing was changed. Use a forward that only "
            "runs the network on a batch."
        )


class _Contents:
    """What lies in dictionaries, in the order in which it does.

    In three long lists: of thousands of small containers Python collects garbage, which takes longer than all else.
    """

    def __init__(self, homes: Iterable[dict[str, Any]]) -> None:
        self._homes = list(homes)
        self._keys = [key for home in self._homes for key in home]
        self._values = [value for home in self._homes for value in home.values()]
        self._ends = list(accumulate(map(len, self._homes)))

    def tensors(self) -> dict[int, Tensor]:
        """Return each tensor once by its id, lazy ones left out."""
        return {id(one): one for one in self._values if one is not None and not is_lazy(one)}

    def each(self) -> Iterator[list[tuple[str, Any]]]:
        """Yield what each dictionary held."""
        start = 0
        for end in self._ends:
            yield list(zip(self._keys[start:end], self._values[start:end], strict=True))
            start = end

    def put_back(self) -> set[int]:
        """Put back what differs, and return the ids of what was no longer in its place."""
        missing: set[int] = set()
        held = zip(self._keys, self._values, strict=True)
        for home, start, end in zip(self._homes, (0, *self._ends), self._ends, strict=False):
            # Iterated to its end whatever is found: the next one begins there.
            same = [home.get(key, home) is value for key, value in islice(held, end - start)]
            if len(home) != len(same) or not all(same) or list(home) != self._keys[start:end]:
                own = dict(zip(self._keys[start:end], self._values[start:end], strict=True))
                missing |= {id(value) for key, value in own.items() if home.get(key, home) is not value}
                home.clear()
                home.update(own)
        return missing


class _Copies:
    """Copies of tensors, and their forms; of sparse ones there is none."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if is_plain(tensor)]
        self._copies = Flat(self._tensors)
        # Each form once: Python collects garbage of what stays.
        forms = ((tensor.shape, tensor.stride(), tensor.dtype) for tensor in self._tensors)
        seen: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._forms = [seen.setdefault(form, form) for form in forms]

    def put_back(self) -> set[int]:
        """Write values and forms back wherever they are others, and return the ids of these tensors.

        A tensor that was resized gets memory of its own.
        """
        moved: set[int] = set()
        for tensor, (shape, stride, dtype) in zip(self._tensors, self._forms, strict=True):
            if tensor.shape != shape or tensor.stride() != stride or tensor.dtype != dtype:
                moved.add(id(tensor))
                tensor.data = torch.empty_strided(shape, stride, dtype=dtype, device=tensor.device)
        for index, copy in self._copies.changed(self._tensors):
            tensor = self._tensors[index]
            moved.add(id(tensor))
            # Past autograd and versions, which others watch.
            tensor.data.copy_(copy.view_as(tensor))
        return moved
