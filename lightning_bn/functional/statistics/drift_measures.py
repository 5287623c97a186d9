"""Distances between two snapshots of running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_bn.functional._checks import check_choice
from lightning_bn.functional._text import quoted
from lightning_bn.functional.statistics.snapshots import Snapshot

Measure: TypeAlias = Literal["jeffreys", "wasserstein", "mean_shift", "log_variance_ratio", "hellinger", "output"]
MEASURES: tuple[str, ...] = get_args(Measure)


def drift(reference: Snapshot, current: Snapshot, measure: Measure = "jeffreys") -> dict[str, Tensor]:
    """How far each channel's running statistics are from a reference: per layer a tensor of shape ``(C,)``, float64.

    With m0, v0 of the reference and m1, v1 now, each layer's ``eps`` added to both variances, z = (m1 - m0) / sqrt(v0)
    and r = v1 / v0, all of them are free of the input's scale and 0 where nothing moved:

    - ``"jeffreys"``: symmetrized Kullback-Leibler divergence of the two Gaussians, 1/2 [r + 1/r - 2 + z^2 (1 + 1/r)],
      in [0, inf). 0.1 is a variance ratio of 1.56 or a mean shift of 0.32 sigma.
    - ``"wasserstein"``: squared 2-Wasserstein distance over v0, z^2 + (sqrt(r) - 1)^2, in [0, inf).
    - ``"mean_shift"``: z, signed, in standard deviations of the reference.
    - ``"log_variance_ratio"``: ln r, signed; 0.69 is a doubled variance.
    - ``"hellinger"``: Hellinger distance of the two Gaussians, in [0, 1].
    - ``"output"``: mean squared change of the layer's evaluation output for inputs distributed as the reference says,
      weight^2 [(1/sqrt(r) - 1)^2 + z^2 / r] with the current affine weight, in squared units of the output.

    Args:
        reference: What to measure from.
        current: What to measure; of the same layers.
        measure: One of the above.

    Raises:
        ValueError: If ``measure`` is unknown or the snapshots are of different layers.

    Source: Jeffreys (1946); Olkin & Pukelsheim (1982) for the 2-Wasserstein distance of Gaussians.
    """
    shift, ratio = standardized(reference, current)
    return reference.layout.split(of_standardized(measure, shift, ratio, current.weight))


def of_standardized(measure: Measure, shift: Tensor, ratio: Tensor, weight: Tensor) -> Tensor:
    """A measure from its ingredients: z and r of :func:`standardized`, and the affine weight."""
    check_choice("measure", measure, MEASURES)
    return _FORMULAS[measure](shift, ratio, weight.to(shift))


def standardized(reference: Snapshot, current: Snapshot) -> tuple[Tensor, Tensor]:
    """z, the shift of the mean in standard deviations of the reference, and r, the ratio of variances; float64."""
    if reference.layout != current.layout:
        sizes_now = dict(zip(current.names, current.layout.sizes, strict=True))
        sizes_then = dict(zip(reference.names, reference.layout.sizes, strict=True))
        names = [*reference.names, *(name for name in current.names if name not in sizes_then)]
        differing = [name for name in names if sizes_then.get(name) != sizes_now.get(name)] or names
        raise ValueError(
            f"drift needs two snapshots of the same layers in the same order; they differ in {quoted(differing)} "
            f"({sizes_then.get(differing[0], 'no')} and {sizes_now.get(differing[0], 'no')} channels)."
        )
    reference, current = reference.where_doubles_are(), current.where_doubles_are()
    device = current.mean.device
    eps = reference.eps_of().to(device)
    v0 = reference.var.to(device, torch.float64) + eps
    v1 = current.var.to(torch.float64) + eps
    shift = (current.mean.to(torch.float64) - reference.mean.to(device, torch.float64)) / v0.sqrt()
    return shift, v1 / v0


def _jeffreys(shift: Tensor, ratio: Tensor, _: Tensor) -> Tensor:
    # (r - 1)^2 / r is r + 1/r - 2 without the cancellation near r = 1.
    return 0.5 * ((ratio - 1).square() / ratio + shift.square() * (1 + 1 / ratio))


def _wasserstein(shift: Tensor, ratio: Tensor, _: Tensor) -> Tensor:
    return shift.square() + (ratio.sqrt() - 1).square()


def _hellinger(shift: Tensor, ratio: Tensor, _: Tensor) -> Tensor:
    # -log of the Bhattacharyya coefficient; log1p and expm1 keep small distances from rounding to 0 or below.
    distance = 0.25 * shift.square() / (1 + ratio) + 0.5 * torch.log1p((ratio.sqrt() - 1).square() / (2 * ratio.sqrt()))
    return (-torch.expm1(-distance)).sqrt()


def _output(shift: Tensor, ratio: Tensor, weight: Tensor) -> Tensor:
    return weight.square() * ((ratio.rsqrt() - 1).square() + shift.square() / ratio)


_FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "jeffreys": _jeffreys,
    "wasserstein": _wasserstein,
    "mean_shift": lambda shift, ratio, weight: shift,
    "log_variance_ratio": lambda shift, ratio, weight: ratio.log(),
    "hellinger": _hellinger,
    "output": _output,
}
