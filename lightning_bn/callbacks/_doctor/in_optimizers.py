"""Weight and bias of BatchNorm layers in the optimizers: there at all, and decayed."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.callbacks._doctor.examined_fit import ExaminedFit
from lightning_bn.functional._text import counted
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.remedies import freeze_lines, freeze_yaml, lines
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
            lines(
                "# in configure_optimizers, give the optimizer all parameters:",
                _optimizer(fit, "self.parameters()"),
                "# or freeze the statistics of these layers too:",
                freeze_lines(fit.examination, unseen),
            ),
            freeze_yaml(fit.examination, unseen),
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
                lines(
                    "# in configure_optimizers, all parameters, also those without requires_grad;",
                    "# the freezer drops the gradients itself:",
                    _optimizer(fit, "self.parameters()"),
                ),
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
            lines(
                "# in configure_optimizers:",
                "matrices = [p for p in self.parameters() if p.ndim > 1]",
                "others = [p for p in self.parameters() if p.ndim <= 1]",
                "groups = [{'params': matrices}, {'params': others, 'weight_decay': 0.0}]",
                _optimizer(fit, "groups"),
            ),
        )


def _optimizer(fit: ExaminedFit, parameters: str) -> str:
    """The line that makes the first optimizer of the fit, with its learning rate and weight decay."""
    optimizer = (fit.optimizers or ())[0]
    kind, defaults = type(optimizer), optimizer.defaults
    name = f"torch.optim.{kind.__name__}" if kind.__module__.startswith("torch.optim") else kind.__name__
    given = {key: defaults[key] for key in ("lr", "weight_decay") if isinstance(defaults.get(key), float | int)}
    settings = "".join(f", {key}={value!r}" for key, value in given.items() if value or key == "lr")
    return f"{name}({parameters}{settings})"


def _needs_gradient(layer: _BatchNorm) -> bool:
    return any(parameter.requires_grad for parameter in affine_parameters(layer))
