"""A model, and what forwards of some batches showed of it: what all rules look at."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.doctor.traces import Traces, Use
from lightning_bn.functional.layers.patterns import shortest_paths
from lightning_bn.functional.layers.properties import has_running_statistics, processes_of
from lightning_bn.functional.layers.sets_per_task import sets_of
from lightning_bn.functional.layers.status import is_frozen


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
        complete: Whether what was run reaches all that training reaches.
    """

    model: nn.Module
    layers: Mapping[str, _BatchNorm]
    traces: Traces | None = None
    frozen_later: frozenset[str] = frozenset()
    by_task: frozenset[str] = frozenset()
    processes: int = 1
    synchronized: bool = False
    complete: bool = True

    @property
    def in_training(self) -> bool:
        """Whether anything is in train mode: if nothing is, what is in eval mode was not chosen."""
        return any(module.training for module in self.model.modules())

    @property
    def for_inference(self) -> bool:
        """Whether nothing trains: all is in eval mode, and no parameter requires a gradient."""
        parameters = [*self.model.parameters()]
        return not (self.in_training or not parameters or any(parameter.requires_grad for parameter in parameters))

    def is_frozen(self, name: str) -> bool:
        """Whether a layer's statistics are kept: through this package, now or soon, or in eval mode by choice."""
        layer = self.layers[name]
        chosen = not layer.training and (self.in_training or self.for_inference)
        return is_frozen(layer) or name in self.frozen_later or chosen

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
