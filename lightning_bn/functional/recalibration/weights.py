"""Weights that a forward must not move: copied, compared bit by bit at the end, put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_bn.functional._bits import is_plain, same_bits
from lightning_bn.functional._text import quoted
from lightning_bn.functional.layers.properties import is_lazy
from lightning_bn.functional.layers.torch_private import parameters_of
from lightning_bn.functional.recalibration.result import WeightsMovedError


@contextmanager
def preserved_weights(model: nn.Module) -> Iterator[None]:
    """Put back at the end what a forward did to weights and gradients; costs a copy of the weights.

    Raises:
        WeightsMovedError: At the end, if a weight that requires a gradient was written to or replaced. Others, such as
            a teacher's, are put back and nothing is said.
    """
    named = [(prefix, module, dict(parameters_of(module))) for prefix, module in model.named_modules()]
    weights = [weight for weight in model.parameters() if not is_lazy(weight) and is_plain(weight)]
    kept = [(weight, weight.detach().clone(), weight.grad) for weight in weights]
    moved: set[int] = set()
    # A backward inside the forward begins its own gradients.
    for weight in weights:
        weight.grad = None
    try:
        yield
    finally:
        for weight, values, gradient in kept:
            if (weight.shape, weight.stride(), weight.dtype) != (values.shape, values.stride(), values.dtype):
                moved.add(id(weight))
                weight.data = values
            elif not same_bits(weight, values):
                moved.add(id(weight))
                # Past autograd and versions, as those who write to weights in a step do.
                weight.data.copy_(values)
            weight.grad = gradient
        trained = [
            f"{prefix}.{name}" if prefix else name
            for prefix, module, own in named
            for name, weight in own.items()
            if weight is not None
            and weight.requires_grad
            and (id(weight) in moved or parameters_of(module).get(name) is not weight)
        ]
        for _, module, own in named:
            parameters_of(module).clear()
            parameters_of(module).update(own)
    if trained:
        raise WeightsMovedError(
            f"the forward writes to the trained weight{'s' * (len(trained) > 1)} {quoted(trained)}, which would change "
            f"the training; put back, and nothing was changed. Use a forward that only runs the network on a batch."
        )
