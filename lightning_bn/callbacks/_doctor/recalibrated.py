"""Recalibrations that would collect statistics with noise that evaluation does not have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks._doctor.examined_fit import ExaminedFit
from lightning_bn.functional._batches import copied_batch, default_forward, model_device, to_device
from lightning_bn.functional._text import counted
from lightning_bn.functional.doctor.dropout import NOTICEABLE, ratio_of_variances
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.isolated_forward import isolated_forward
from lightning_bn.functional.doctor.remedies import callback_yaml
from lightning_bn.functional.doctor.traces import Trace
from lightning_bn.functional.doctor.tracing import traced

_DRAWS = 3


def noise_in_recalibration(fit: ExaminedFit) -> Iterator[Finding]:
    """Find layers that PreciseBatchNorm would recalibrate with dropout that containers apply by their own flag."""
    precise = [one for one in fit.callbacks("PreciseBatchNorm") if not one.containers_in_eval]
    layers = fit.examination.tracking_layers()
    if not precise or not fit.batches or not layers:
        return
    # A step may ask for what only training has.
    traces = fit.tried(
        "noise-in-recalibration", lambda: [_traces(fit, containers=containers) for containers in (True, False)]
    )
    if traces is None:
        return
    noisy, calm = traces
    ratios = {
        name: ratio_of_variances(noisy, calm, name, 0) for name in layers if name in noisy[0].uses and calm[0].uses
    }
    found = [name for name, ratio in ratios.items() if ratio >= NOTICEABLE]
    if found:
        worst = max(found, key=ratios.__getitem__)
        yield Finding(
            "noise-in-recalibration",
            "fault",
            fit.examination.in_order(found),
            f"PreciseBatchNorm would recalibrate {counted(len(found), 'layer')} with dropout or stochastic depth that "
            f"containers apply by their own flag: the variance in {worst!r} is off by a factor of {ratios[worst]:.2f}.",
            "For the pass, dropout layers are off and containers keep their mode, since some models return losses in "
            "train mode only; what these draw themselves is then part of the statistics, and of no evaluation.",
            "Trainer(callbacks=[PreciseBatchNorm(containers_in_eval=True)])",
            callback_yaml("PreciseBatchNorm", containers_in_eval=True),
        )


def _traces(fit: ExaminedFit, *, containers: bool) -> list[Trace]:
    """What forwards do where leaf modules are in eval mode, as in a recalibration."""
    examination, model = fit.examination, fit.module
    targets = [*examination.tracking_layers().values()]
    training: list[nn.Module] = [*targets]
    if containers:
        everything = not examination.in_training
        training += [one for one in model.modules() if _keeps_its_mode(one) and (one.training or everything)]
    batch, forward = to_device(fit.batches[0], model_device(model)), fit.forward or default_forward
    found = []
    with isolated_forward(model, training):
        for seed in range(_DRAWS):
            torch.manual_seed(seed)
            found.append(traced(model, examination.layers, _Run(forward, model, copied_batch(batch))))
    return found


class _Run:
    def __init__(self, *parts: Any) -> None:
        self._forward, self._model, self._batch = parts

    def __call__(self) -> Any:
        return self._forward(self._model, self._batch)


def _keeps_its_mode(module: nn.Module) -> bool:
    """Whether a recalibration leaves the mode of a module: a container that is no layer of torch's own."""
    kind = type(module)
    of_torch = kind.__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
    return not isinstance(module, _BatchNorm) and any(True for _ in module.children()) and not of_torch
