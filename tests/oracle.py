"""What statistics ought to be: the inputs of every layer, captured in a pass of its own, concatenated, in float64."""

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.models import bits

Run = Callable[[nn.Module, Any], Any]


def first(model: nn.Module, batch: Any) -> Any:
    """Run the model on a tensor, or on the first element of a tuple or list."""
    return model(batch if isinstance(batch, Tensor) else batch[0])


def per_channel(x: Tensor) -> Tensor:
    """The values of each channel, (C, n), in float64."""
    return x.detach().to(torch.float64).transpose(0, 1).flatten(1)


@contextmanager
def captured_inputs(layers: dict[str, nn.Module]):
    """Collect what the layers are given inside, by name: a list of (C, n) tensors."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(per_channel(args[0])))
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def layer_inputs(
    model: nn.Module, batches: Iterable[Any], names: Sequence[str] | None = None, run: Run = first
) -> dict[str, Tensor]:
    """By layer all values it sees, (C, n): the named layers normalize with the batch, dropout and the like are off.

    Works on a copy of the model. By default all BatchNorm layers with running statistics are meant.
    """
    twin = copy.deepcopy(model)
    if names is None:
        norms = [n for n, m in twin.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        names = norms
    layers = {name: twin.get_submodule(name) for name in names}
    for module in twin.modules():
        if isinstance(module, _BatchNorm) or not list(module.children()):
            module.training = False
    for layer in layers.values():
        layer.training = True
    with torch.random.fork_rng(devices=[]), torch.no_grad(), captured_inputs(layers) as seen:
        for batch in batches:
            run(twin, batch)
    return {name: torch.cat(values, 1) for name, values in seen.items() if values}


def assert_statistics_of(layer: nn.Module, values: Tensor, tolerance: float = 1e-5) -> None:
    """The layer's running statistics are those of ``values`` (C, n): mean and unbiased variance.

    Means within ``tolerance`` of the larger of |mean| and the standard deviation, variances relatively.
    """
    var, mean = torch.var_mean(values, 1, correction=1)
    found_mean, found_var = layer.running_mean.double(), layer.running_var.double()
    scale = torch.maximum(mean.abs(), var.sqrt())
    mean_error, var_error = ((found_mean - mean).abs() / scale).max(), ((found_var - var).abs() / var).max()
    assert mean_error <= tolerance, f"mean off by {mean_error:.3g}: {found_mean.tolist()} is not {mean.tolist()}"
    assert var_error <= tolerance, f"variance off by {var_error:.3g}: {found_var.tolist()} is not {var.tolist()}"


def assert_all_statistics(model: nn.Module, inputs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """The same for all layers of ``inputs``."""
    assert inputs
    for name, values in inputs.items():
        assert_statistics_of(model.get_submodule(name), values, tolerance)


_STATISTICS = ("running_mean", "running_var")


def everything(model: nn.Module, but_statistics_of: Iterable[str] = ()) -> dict[str, Any]:
    """All there is to a model, by module: class, mode, attributes, hooks, tensors as objects and as bits, gradients.

    For some BatchNorm layers the values of the running statistics can be left out; that they are the same tensor
    objects is still told.
    """
    open_layers = set(but_statistics_of)
    told: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = {key: list(value) for key, value in module.__dict__.items() if "hooks" in key and value is not None}
        plain = {k: v for k, v in module.__dict__.items() if isinstance(v, str | int | float | bool | type(None))}
        buffers = {
            key: (id(value), None if value is None or (name in open_layers and key in _STATISTICS) else bits(value))
            for key, value in module._buffers.items()
        }
        parameters = {
            key: (id(p), bits(p), p.requires_grad, id(p.grad), None if p.grad is None else bits(p.grad))
            for key, p in module._parameters.items()
            if p is not None
        }
        told[name] = (type(module), module.training, plain, hooks, buffers, parameters, sorted(module.__dict__))
    return told


def generators() -> tuple[Any, ...]:
    """The states of Python's, numpy's and torch's global generators, as values that compare."""
    numpy_state = np.random.get_state()
    return (
        random.getstate(),
        (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),  # type: ignore[union-attr]
        torch.get_rng_state().tolist(),
    )
