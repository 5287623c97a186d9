"""Population statistics from batches (precise BN), written into the layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional.batches import default_forward, model_device, num_samples, to_device
from lightning_bn.functional.collecting import Collected, Collector, OneValuePerChannelError
from lightning_bn.functional.drift import summarize
from lightning_bn.functional.layers import quoted, tracked_layers
from lightning_bn.functional.moments import variance
from lightning_bn.functional.patterns import Patterns
from lightning_bn.functional.snapshots import Snapshot, snapshot_of
from lightning_bn.functional.status import is_frozen
from lightning_bn.functional.undisturbed import (
    preserved_buffers,
    preserved_modes,
    preserved_rng,
    run_as_written,
    set_modes_for_statistics,
)


@dataclass(frozen=True)
class Recalibration:
    """What one recalibration did.

    Attributes:
        layers: Names of the layers whose statistics were rewritten.
        before: Their running statistics as they were.
        after: Their population statistics, as they are now.
        num_batches: Batches used.
        num_samples: Samples in them; None if a batch has no tensor to count them by.
        requested_batches: What was asked for; None for all there are.
        skipped_batches: Batches left out because a layer saw one value per channel.
        nonfinite: By layer, forwards left out because a batch statistic was not finite.
        unreached: Layers that no forward reached; left as they were.
        frozen: Selected layers left alone because they are frozen, or in eval inside a model in training.
        seconds: How long it took.
    """

    layers: tuple[str, ...]
    before: Snapshot
    after: Snapshot
    num_batches: int
    num_samples: int | None
    requested_batches: int | None
    skipped_batches: int
    nonfinite: dict[str, int]
    unreached: tuple[str, ...]
    frozen: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        amount = f"{self.num_batches:,} batches" if self.num_samples is None else f"{self.num_samples:,} samples"
        said = [f"{len(self.layers)} BatchNorm layers recalibrated from {amount} in {self.seconds:.2g} s"]
        if self._ended_early:
            said.append(f"the data ended after {self.num_batches:,} of {self.requested_batches:,} batches")
        worst = summarize(reference=self.after, current=self.before)
        if worst.max > 0.01:
            said.append(f"replaced statistics that were off most at {worst.in_words()}")
        if self.frozen:
            said.append(f"{len(self.frozen)} frozen untouched")
        if self.skipped_batches:
            said.append(f"{self.skipped_batches} batches skipped, one value per channel")
        if self.nonfinite:
            said.append(f"non-finite batches left out at {quoted(list(self.nonfinite))}")
        if self.unreached:
            said.append(f"not reached and left as they were: {quoted(self.unreached)}")
        return "; ".join(said)

    @property
    def _ended_early(self) -> bool:
        return self.requested_batches is not None and self.num_batches + self.skipped_batches < self.requested_batches


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    modules: Patterns = None,
    exclude: Patterns = None,
    root: str = "",
    forward: Callable[[Any, Any], Any] | None = None,
    num_batches: int | None = None,
) -> Recalibration:
    """Replaces running statistics by those of the population that ``batches`` are drawn from, with the weights of now.

    Every batch is run forward once, without gradients, each layer normalising with the batch as in training. What a
    layer sees is pooled over all batches, positions and uses in float64; the mean and the unbiased variance of the
    pooled values are written in place, ``num_batches_tracked`` stays. Everything else is afterwards as it was, also
    after a failure, which leaves the statistics as they were too: modes, momentum, hooks, other buffers, random number
    generators, gradients.

    Rewritten are the selected layers except those that were frozen through this package and those in eval inside a
    model in training; where the whole model is in eval, all selected ones. For the pass other leaf modules are in eval
    (no dropout) and containers keep their mode.

    Args:
        model: Any module.
        batches: What to feed, for instance a DataLoader. 10^3 to 10^4 samples are near-optimal; batches may be larger
            than in training.
        modules: As for :func:`~lightning_bn.functional.batch_norm_layers`.
        exclude: As for ``batch_norm_layers``.
        root: As for ``batch_norm_layers``.
        forward: Runs the model on one batch: ``forward(model, batch)``. By default the model is called on a tensor, on
            the first element of a tuple or list, or with the items of a dict as keywords. The batch has been moved to
            the model's device.
        num_batches: How many batches at most; None for all.

    Returns:
        What was done; printed, it is one sentence.

    Raises:
        ValueError: If ``num_batches`` is below 1; if there is no batch, or none that can be used; if no selected layer
            was reached, or all of them are frozen.
        SelectionError: As for ``batch_norm_layers``, or if a selected layer has no running statistics.
        TypeError: If ``batches`` is one tensor, or a batch cannot be fed without ``forward``.

    Source: Wu & Johnson (2021), "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3; Ioffe & Szegedy
    (2015), arXiv 1502.03167, algorithm 2. Pooling follows Chan, Golub & LeVeque (1979).

    Example:
        >>> data = torch.arange(12.0).reshape(6, 2)
        >>> layer = nn.BatchNorm1d(2)
        >>> result = recalibrate(layer, data.split(2))
        >>> layer.running_mean, layer.running_var
        (tensor([5., 6.]), tensor([14., 14.]))
        >>> result.num_batches, result.num_samples
        (3, 6)
    """
    _check(batches, num_batches)
    started = time.monotonic()
    selected = tracked_layers(model, modules, exclude, root)
    targets = _targets(model, selected)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(run_as_written())
        stack.enter_context(preserved_rng())
        stack.enter_context(preserved_modes(model))
        stack.enter_context(preserved_buffers(model))
        collector = stack.enter_context(Collector(targets))
        set_modes_for_statistics(model, targets.values())
        used = _Used()
        used.run(model, batches, forward or default_forward, collector, num_batches)
        gathered = collector.collected()
    used.check(num_batches)
    reached = {name: targets[name] for name, found in gathered.items() if found.moments.count > 1}
    if not reached:
        raise ValueError(_why_none(gathered, used.batches))
    before = snapshot_of(reached)
    _write(reached, gathered)
    return Recalibration(
        layers=tuple(reached),
        before=before,
        after=snapshot_of(reached),
        num_batches=used.batches,
        num_samples=used.samples,
        requested_batches=num_batches,
        skipped_batches=used.skipped,
        nonfinite={name: found.nonfinite for name, found in gathered.items() if found.nonfinite},
        unreached=tuple(name for name, found in gathered.items() if not found.uses and not found.nonfinite),
        frozen=tuple(name for name in selected if name not in targets),
        seconds=time.monotonic() - started,
    )


def _check(batches: Any, num_batches: int | None) -> None:
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches={num_batches} must be at least 1, or None for all batches.")
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}, not an iterable of batches: pass a DataLoader, or [batch] for "
            f"a single one."
        )


def _targets(model: nn.Module, selected: Mapping[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    """The selected layers that are not frozen; eval says frozen only where something else is in training."""
    in_training = any(module.training for module in model.modules())
    targets = {
        name: layer for name, layer in selected.items() if not is_frozen(layer) and (layer.training or not in_training)
    }
    if not targets:
        raise ValueError(
            f"nothing to recalibrate: all {len(selected)} selected BatchNorm layers are frozen, or in eval inside a "
            f"model in training ({quoted(list(selected))}). Unfreeze them, or call model.eval() if eval was not meant "
            f"to freeze them."
        )
    return targets


class _Used:
    """How much of the data came and was used."""

    def __init__(self) -> None:
        self.batches = 0
        self.skipped = 0
        self.samples: int | None = 0
        self._skipped_at = ""

    def run(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Callable[[Any, Any], Any],
        collector: Collector,
        most: int | None,
    ) -> None:
        device = model_device(model)
        iterator = iter(batches)
        while most is None or self.batches + self.skipped < most:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            try:
                with collector.batch():
                    forward(model, to_device(batch, device))
            except OneValuePerChannelError as error:
                self.skipped += 1
                self._skipped_at = error.layer
            else:
                self.batches += 1
                count = num_samples(batch)
                self.samples = None if count is None or self.samples is None else self.samples + count

    def check(self, requested: int | None) -> None:
        if not self.batches and self.skipped:
            raise ValueError(
                f"no batch could be used: in all {self.skipped} of them BatchNorm layer {self._skipped_at!r} saw one "
                f"value per channel. Use batches of at least 2 samples, or leave the layer out with exclude."
            )
        if not self.batches:
            asked = "" if requested is None else f" ({requested} were asked for)"
            raise ValueError(f"the loader gave no batch{asked}: nothing was changed. Is the dataset or iterator empty?")


def _why_none(gathered: Mapping[str, Collected], batches: int) -> str:
    bad = [name for name, found in gathered.items() if found.nonfinite]
    if bad:
        return (
            f"no statistics could be collected from {batches} batches: the input of {quoted(bad)} was never finite. "
            f"Nothing was changed; look for inf or NaN in the data or the weights."
        )
    return (
        f"none of the {len(gathered)} selected BatchNorm layers was reached by the forward in {batches} batches: "
        f"{quoted(list(gathered))}. Nothing was changed; pass a forward= that runs them."
    )


def _write(layers: Mapping[str, _BatchNorm], gathered: Mapping[str, Collected]) -> None:
    with torch.no_grad():
        for name, layer in layers.items():
            sample = gathered[name].moments
            for buffer, values in ((layer.running_mean, sample.mean), (layer.running_var, variance(sample))):
                if buffer is not None:
                    buffer.copy_(values)
