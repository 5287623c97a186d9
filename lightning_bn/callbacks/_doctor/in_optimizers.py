"""Weight and bias of BatchNorm layers in the optimizers: there at all, and decayed."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks._doctor.examined_fit import ExaminedFit
from lightning_bn.functional._text import counted
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.frozen_by_halves import freeze_line
from lightning_bn.functional.layers.properties import affine_parameters


def not_in_optimizer(fit: ExaminedFit) -> Iterator[Finding]:
    """Find layers that train and of which no optimizer has weight and bias, or that are to be unfrozen later."""
    if not fit.optimizers:
        return
    layers = fit.examination.tracking_layers()
    # These add parameters when they unfreeze.
    trained = (
        [] if fit.callbacks("BaseFinetuning") else [name for name, layer in layers.items() if _needs_gradient(layer)]
    )
    unseen = fit.unseen(trained)
    if unseen:
        yield Finding(
            "not-in-optimizer",
            "fault",
            fit.examination.in_order(unseen),
            f"{counted(len(unseen), 'layer')} in train mode {'is' if len(unseen) == 1 else 'are'} in no optimizer: "
            f"weight and bias never change, the running statistics do.",
            "What an optimizer is not given is frozen by half: each batch moves the statistics, and with them the "
            "outputs of what was meant to stay.",
            f"add them to configure_optimizers (self.parameters()), or freeze all of them: "
            f"{freeze_line(fit.examination, unseen)}",
        )
    for freezer in fit.callbacks("BatchNormFreezer"):
        plan = fit.plan(freezer)
        if plan is None:
            continue
        ends = plan.schedule.stop_epoch is not None or plan.schedule.stop_step is not None
        later = fit.unseen(layer.name for layer in plan.frozen if layer.affine and ends)
        later = [name for name in later if name not in unseen]
        if later:
            yield Finding(
                "not-in-optimizer",
                "fault",
                fit.examination.in_order(later),
                f"{counted(len(later), 'layer')} that BatchNormFreezer unfreezes ({plan.schedule}) "
                f"{'is' if len(later) == 1 else 'are'} in no optimizer.",
                "An optimizer that was made without their weight and bias never sees them: they stay as they are after "
                "the freeze too.",
                "give the optimizer all parameters, without a filter for requires_grad: "
                "torch.optim.SGD(self.parameters(), lr=lr)  # the freezer drops the gradients itself",
            )


def affine_under_weight_decay(fit: ExaminedFit) -> Iterator[Finding]:
    """Find layers whose weight or bias an optimizer decays."""
    groups = [group for optimizer in fit.optimizers or () for group in optimizer.param_groups]
    decayed = {id(parameter) for group in groups if group.get("weight_decay") for parameter in group["params"]}
    found = [
        name
        for name, layer in fit.examination.layers.items()
        if any(id(parameter) in decayed and parameter.requires_grad for parameter in affine_parameters(layer))
    ]
    if found:
        yield Finding(
            "affine-under-weight-decay",
            "advice",
            fit.examination.in_order(found),
            f"weight and bias of {counted(len(found), 'layer')} are under weight decay.",
            "Decay pulls the scale of each channel towards 0; many recipes leave the parameters of normalization "
            "layers out.",
            "a group of their own: {'params': [p for p in self.parameters() if p.ndim <= 1], 'weight_decay': 0.0}",
        )


def _needs_gradient(layer: _BatchNorm) -> bool:
    return any(parameter.requires_grad for parameter in affine_parameters(layer))
