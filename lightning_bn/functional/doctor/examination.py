"""A model, and what forwards of some batches showed of it: what all rules look at."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._batches import default_forward, model_device, num_samples, to_device
from lightning_bn.functional.doctor.isolated_forward import isolated_forward
from lightning_bn.functional.doctor.tracing import traced
from lightning_bn.functional.doctor.use import Dropout, Trace, Use
from lightning_bn.functional.layers.names import named_batch_norm
from lightning_bn.functional.layers.patterns import shortest_paths
from lightning_bn.functional.layers.properties import has_running_statistics, processes_of
from lightning_bn.functional.layers.sets_per_task import sets_of
from lightning_bn.functional.layers.status import is_frozen

Forward = Callable[[nn.Module, Any], Any]
_AGAIN = 3
"""Further forwards with other random numbers, where one does not tell."""


@dataclass(frozen=True)
class Traces:
    """What forwards of some batches did, all with the same weights.

    Attributes:
        batches: Of each batch, in train mode.
        again: Of the first batch in train mode, with other random numbers; empty where one forward tells.
        without_dropout: As ``again``, where dropout does nothing.
        in_eval: Of the first batch in eval mode; None where that is of no interest or fails.
        samples: In each batch; None where they cannot be counted.
        tasks: Names of the parts of a batch that consists of several batches.
    """

    batches: tuple[Trace, ...]
    again: tuple[Trace, ...] = ()
    without_dropout: tuple[Trace, ...] = ()
    in_eval: Trace | None = None
    samples: tuple[int | None, ...] = ()
    tasks: tuple[str, ...] = ()

    @property
    def reached(self) -> set[str]:
        """The layers that any forward in train mode reached."""
        return {name for trace in (*self.batches, *self.again) for name in trace.uses}


@dataclass(frozen=True)
class Examination:
    """What the rules look at.

    Attributes:
        model: Which.
        layers: Its BatchNorm layers, by canonical name.
        traces: What forwards did; None without a batch.
        frozen_later: Layers that something freezes before the first training batch.
        by_task: Layers that something gives statistics for each task before that.
        processes: How many processes train together.
        synchronized: Whether their batches are normalized together, as far as that is not the layers' own doing.
    """

    model: nn.Module
    layers: Mapping[str, _BatchNorm]
    traces: Traces | None = None
    frozen_later: frozenset[str] = frozenset()
    by_task: frozenset[str] = frozenset()
    processes: int = 1
    synchronized: bool = False

    @property
    def in_training(self) -> bool:
        """Whether anything is in train mode: if nothing is, what is in eval mode was not chosen."""
        return any(module.training for module in self.model.modules())

    def is_frozen(self, name: str) -> bool:
        """Whether a layer's statistics are kept: through this package, now or soon, or in eval inside what trains."""
        layer = self.layers[name]
        return is_frozen(layer) or name in self.frozen_later or (self.in_training and not layer.training)

    def training_layers(self) -> dict[str, _BatchNorm]:
        """Return the layers that normalize with the batch in training."""
        return {name: layer for name, layer in self.layers.items() if not self.is_frozen(name)}

    def frozen_layers(self) -> dict[str, _BatchNorm]:
        """Return the others."""
        return {name: layer for name, layer in self.layers.items() if self.is_frozen(name)}

    def tracking_layers(self) -> dict[str, _BatchNorm]:
        """Return the layers that move running statistics in training, by their buffers and flags."""
        return {
            name: layer
            for name, layer in self.training_layers().items()
            if has_running_statistics(layer) and layer.track_running_stats and layer.momentum != 0
        }

    def has_sets(self, name: str) -> bool:
        """Whether a layer has statistics for each task, now or soon."""
        return name in self.by_task or sets_of(self.layers[name]) is not None

    def processes_of(self, name: str) -> int:
        """How many processes' batches a layer normalizes together in training."""
        layer = self.layers[name]
        together = self.synchronized or isinstance(layer, nn.SyncBatchNorm)
        return max(processes_of(layer), self.processes if together else 1)

    def in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return names of layers in registration order."""
        chosen = {*names}
        return tuple(name for name in self.layers if name in chosen)

    def paths(self, names: Collection[str]) -> str:
        """Return the shortest paths that mean these layers and no other, as Python writes a list."""
        return repr(shortest_paths(names, self.layers))

    def uses(self, name: str) -> list[list[Use]]:
        """Return the uses of a layer in train mode, of each batch that reached it."""
        traces = () if self.traces is None else self.traces.batches
        found = ([use for use in trace.uses.get(name, ()) if use.training] for trace in traces)
        return [uses for uses in found if uses]


def examine(model: nn.Module, batches: Sequence[Any] = (), forward: Forward | None = None, **known: Any) -> Examination:
    """Return what rules look at; the batches are run forward, and the model is afterwards bit for bit as it was.

    Args:
        model: Any module.
        batches: One for each forward; empty for none.
        forward: As for :func:`~lightning_bn.functional.recalibrate`.
        known: Further attributes of the examination.

    Raises:
        ValueError: If a module is lazy and has seen no batch yet.
    """
    examination = Examination(model, named_batch_norm(model), **known)
    if not batches or not examination.layers:
        return examination
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
            run = partial(forward, inner, batch)
            return traced(model, layers, run, without_dropout=without_dropout, follow=followed)

    with isolated_forward(model, _that_train(examination)):
        watched = [trace(batch) for batch in moved]
        missed = examination.training_layers().keys() - {name for one in watched for name in one.uses}
        after_dropout = any(use.behind.dropouts for one in watched for uses in one.uses.values() for use in uses)
        again = [trace(moved[0], seed) for seed in range(_AGAIN if missed or after_dropout else 0)]
        seeds = range(_AGAIN if after_dropout else 0)
        without = [trace(moved[0], seed, without_dropout=True) for seed in seeds]
    missed -= {name for one in again for name in one.uses}
    in_eval = None
    if missed:
        with isolated_forward(model, ()):
            in_eval = _tried(lambda: trace(moved[0]))
    return Traces(
        tuple(watched), tuple(again), tuple(without), in_eval, tuple(map(num_samples, moved)), _parts(moved[0])
    )


def _tried(trace: Callable[[], Trace]) -> Trace | None:
    """What a forward in eval mode did; None where it asks for what only training has."""
    try:
        return trace()
    except Exception:
        return None


def _that_train(examination: Examination) -> list[nn.Module]:
    """What is in train mode while training: what is so now, or all where the whole model is in eval mode."""
    frozen = {id(layer) for layer in examination.frozen_layers().values()}
    everything = not examination.in_training
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


def dropouts_in(traces: Traces) -> list[Dropout]:
    """Return what dropout was applied in any forward, each once, in order."""
    return list(dict.fromkeys(dropout for trace in traces.batches for dropout in trace.dropouts))
