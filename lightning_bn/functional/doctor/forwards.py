"""The forwards that an examination needs, run on copies of what the model holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from lightning_bn.functional._batches import copied_batch, default_forward, model_device, num_samples, to_device
from lightning_bn.functional._text import named, raised
from lightning_bn.functional.doctor.examination import Examination
from lightning_bn.functional.doctor.isolated_forward import isolated_forward
from lightning_bn.functional.doctor.traces import Trace, Traces
from lightning_bn.functional.doctor.tracing import traced
from lightning_bn.functional.layers.names import named_batch_norm, named_paths
from lightning_bn.functional.layers.properties import is_lazy

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""Runs a model on one batch."""
_AGAIN = 3
"""Further forwards with other random numbers, where one does not tell."""
_DRAWS = 20
"""At most so many until all layers are reached that evaluation reaches: with a depth that is drawn, some are late."""


def examine(model: nn.Module, batches: Sequence[Any] = (), forward: Forward | None = None, **known: Any) -> Examination:
    """Return what rules look at; the batches are run forward, and the model is afterwards bit for bit as it was.

    Args:
        model: Any module.
        batches: One for each forward; empty for none.
        forward: As for :func:`~lightning_bn.functional.recalibrate`.
        known: Further attributes of the examination.

    Raises:
        ValueError: If a tensor of the model has no values yet (lazy, or on the meta device), or a batch has no sample.
    """
    examination = Examination(model, named_batch_norm(model), **known)
    _check_values(model, lazy=bool(batches))
    if not batches or not examination.layers:
        return examination
    if 0 in map(num_samples, batches):
        raise ValueError("a batch is empty: its first tensor has no samples. Pass a batch as training has it.")
    return Examination(model, examination.layers, _traces(examination, batches, forward or default_forward), **known)


def _traces(examination: Examination, batches: Sequence[Any], forward: Forward) -> Traces:
    model, layers = examination.model, examination.layers
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    # Those that a loop over nn.BatchNorm2d misses.
    followed = frozenset(
        name for name, layer in examination.training_layers().items() if not isinstance(layer, nn.BatchNorm2d)
    )
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in examination.frozen_layers().values()):
        followed = frozenset()
    moved = [to_device(batch, model_device(model)) for batch in batches]

    def trace(batch: Any, seed: int | None = None, *, without_dropout: bool = False) -> Trace:
        with nullcontext() if seed is None else torch.random.fork_rng():
            if seed is not None:
                torch.manual_seed(seed)
            run = partial(forward, inner, copied_batch(batch))
            return traced(model, layers, run, without_dropout=without_dropout, follow=followed)

    with isolated_forward(model, _that_train(examination)):
        watched = [trace(batch) for batch in moved]
        missed = examination.training_layers().keys() - {name for one in watched for name in one.uses}
        after_dropout = any(use.behind.dropouts for one in watched for uses in one.uses.values() for use in uses)
        again = [trace(moved[0], seed) for seed in range(_AGAIN if missed or after_dropout else 0)]
        seeds = range(_AGAIN if after_dropout else 0)
        without = [trace(moved[0], seed, without_dropout=True) for seed in seeds]
    missed -= {name for one in again for name in one.uses}
    in_eval, error = None, ""
    drawn: list[frozenset[str]] = []
    if missed:
        with isolated_forward(model, ()):
            try:
                in_eval = trace(moved[0])
            except Exception as why:  # it may ask for what only training has
                error = raised(why)
    if in_eval is not None and missed & in_eval.uses.keys():
        late = missed & in_eval.uses.keys()
        with isolated_forward(model, _that_train(examination)):
            while late and len(drawn) < _DRAWS:
                drawn.append(frozenset(trace(moved[0], _AGAIN + len(drawn)).uses))
                late -= drawn[-1]
    samples = tuple(map(num_samples, moved))
    return Traces(tuple(watched), tuple(again), tuple(without), in_eval, samples, _parts(moved[0]), error, tuple(drawn))


def _check_values(model: nn.Module, *, lazy: bool) -> None:
    """Raise if there are tensors without values, which no rule can look at."""
    for name, module in named_paths(model):
        own = [] if isinstance(module, torch.jit.ScriptModule) else [*module.parameters(False), *module.buffers(False)]
        if lazy and any(map(is_lazy, own)):
            raise ValueError(
                f"module {named(name)} is lazy and has not seen a batch yet: run one forward pass of the model first."
            )
        if any(tensor.is_meta for tensor in own):
            raise ValueError(
                f"module {named(name)} is on the meta device, where tensors have no values: make the model on a real "
                f"device first, or model.to_empty(device=...) and load its weights."
            )


def _that_train(examination: Examination) -> list[nn.Module]:
    """What is in train mode while training: what is so now, or all where the whole model is in eval mode."""
    frozen = {id(layer) for layer in examination.frozen_layers().values()}
    everything = not examination.in_training and not examination.for_inference
    modules = examination.model.modules()
    return [module for module in modules if (module.training or everything) and id(module) not in frozen]


def _parts(batch: Any) -> tuple[str, ...]:
    """Names of the parts of a batch that is a dict of batches, as several loaders at once give it."""
    if (
        isinstance(batch, Mapping)
        and len(batch) > 1
        and all(isinstance(one, list | tuple | Mapping) for one in batch.values())
    ):
        return tuple(map(str, batch))
    return ()
