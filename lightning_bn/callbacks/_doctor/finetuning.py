"""Lightning's own callbacks for finetuning, and what they do to BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_bn.callbacks._doctor.examined_fit import ExaminedFit
from lightning_bn.callbacks._lightning.namespaces import NOT_THE_MODULES_OWN, LightningModule
from lightning_bn.functional._object_copies import on_copies
from lightning_bn.functional._text import counted
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.isolated_forward import isolated_forward
from lightning_bn.functional.doctor.remedies import freeze_lines, freeze_yaml, lines
from lightning_bn.functional.layers.names import named_batch_norm
from lightning_bn.functional.layers.patterns import is_below
from lightning_bn.functional.layers.properties import affine_parameters, has_running_statistics


def frozen_by_finetuning(fit: ExaminedFit) -> Iterator[Finding]:
    """Find layers that a BaseFinetuning callback freezes with ``train_bn=False``, or leaves untrained with it."""
    for callback in fit.callbacks("BaseFinetuning"):
        name = type(callback).__name__
        off, _ = _after_freezing(fit, callback)
        if off:
            yield Finding(
                "frozen-by-finetuning",
                "fault",
                fit.examination.in_order(off),
                f"{name} freezes {counted(len(off), 'layer')} with train_bn=False, which switches track_running_stats "
                f"off and keeps train mode.",
                "Training then normalizes with each batch and evaluation with running statistics that do not follow: "
                "the two modes are different functions.",
                lines(
                    f"# in freeze_before_training of {name}, with its modules:",
                    "self.freeze(modules, train_bn=True)",
                    "# and beside it:",
                    freeze_lines(fit.examination, off),
                ),
                freeze_yaml(fit.examination, off),
            )
        backbone = getattr(fit.module, "backbone", None)
        if getattr(callback, "train_bn", True) is False and backbone is not None:
            layers = [one for one in fit.examination.tracking_layers() if is_below(one, "backbone")]
            if layers:
                yield Finding(
                    "frozen-by-finetuning",
                    "fault",
                    fit.examination.in_order(layers),
                    f"{name}(train_bn=False) does not freeze {counted(len(layers), 'layer')} of the backbone: the "
                    f"running statistics move from the first batch on, weight and bias never reach the optimizer.",
                    "The features change from the first epoch on, though nothing in the backbone seems to train, and "
                    "what was trained on them before gets worse.",
                    lines(
                        f"Trainer(callbacks=[{name}(train_bn=True)])",
                        "# or beside it as it is:",
                        freeze_lines(fit.examination, layers),
                    ),
                    freeze_yaml(fit.examination, layers),
                )


def skipped_when_unfrozen(fit: ExaminedFit) -> Iterator[Finding]:
    """Find frozen layers of equal values, which BaseFinetuning takes for one when it unfreezes them."""
    for callback in fit.callbacks("BaseFinetuning"):
        _, frozen = _after_freezing(fit, callback)
        equal = [name for name in frozen if any(_equal(fit, name, other) for other in frozen if other != name)]
        if equal:
            yield Finding(
                "skipped-when-unfrozen",
                "advice",
                fit.examination.in_order(equal),
                f"{counted(len(equal), 'layer')} that {type(callback).__name__} freezes have equal weights and biases, "
                f"as fresh layers do.",
                "unfreeze_and_add_param_group compares parameters by value: of two that are equal and are unfrozen one "
                "after the other, the optimizer gets the first only, and the second never trains.",
                lines(
                    "# unfreeze them in one call, in finetune_function:",
                    "self.unfreeze_and_add_param_group([module_a, module_b], optimizer)",
                ),
            )


def _after_freezing(fit: ExaminedFit, callback: Any) -> tuple[list[str], list[str]]:
    """Which layers the callback switches tracking off in, and of which it freezes weight and bias.

    It is run once for all rules, and what it does to the module and to itself is put back.
    """
    if id(callback) not in fit.freezings:
        found = fit.tried(f"what {type(callback).__name__} freezes", lambda: _frozen_by(fit.module, callback))
        fit.freezings[id(callback)] = found or ([], [])
    return fit.freezings[id(callback)]


def _frozen_by(module: LightningModule, callback: Any) -> tuple[list[str], list[str]]:
    layers = named_batch_norm(module)
    tracked = {name for name, layer in layers.items() if has_running_statistics(layer) and layer.track_running_stats}
    with isolated_forward(module, [one for one in module.modules() if one.training]):
        known = [*module.modules(), *module.parameters(), *module.buffers()]
        with on_copies([vars(callback)], known, NOT_THE_MODULES_OWN):
            callback.freeze_before_training(module)
        off = [name for name in tracked if not layers[name].track_running_stats]
        affine = {name: affine_parameters(layer) for name, layer in layers.items()}
        return off, [name for name, own in affine.items() if own and not any(one.requires_grad for one in own)]


def _equal(fit: ExaminedFit, name: str, other: str) -> bool:
    mine, others = (affine_parameters(fit.examination.layers[one]) for one in (name, other))
    return len(mine) == len(others) and all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
