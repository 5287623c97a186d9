"""What stands beside BatchNorm layers: biases that they take out again, and layers that only look like them."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_bn.functional._text import counted, quoted
from lightning_bn.functional.doctor.examination import Examination
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.remedies import lines
from lightning_bn.functional.layers.names import kind_of, lookalikes, named_paths


def bias_before_batch_norm(examination: Examination) -> Iterator[Finding]:
    """Find layers that take out the bias of the convolution or linear layer right before them."""
    found: dict[str, str] = {}
    for name in examination.training_layers():
        uses = [use for uses in examination.uses(name) for use in uses]
        origins = {use.origin.module for use in uses if use.origin is not None and use.origin.reads == 1}
        if uses and len(origins) == 1 and all(use.origin is not None for use in uses):
            found[name] = origins.pop()
    if found:
        yield Finding(
            "bias-before-batch-norm",
            "advice",
            examination.in_order(found),
            f"{counted(len(found), 'layer')} {'takes' if len(found) == 1 else 'take'} out the bias of the layer right "
            f"before: {quoted([*found.values()])}.",
            "In training the mean of the batch is subtracted, the bias with it: it has no gradient but for rounding, "
            "and costs memory and time.",
            lines(
                "# where they are made, bias=False; or after that:",
                f"for name in {[*dict.fromkeys(found.values())]!r}:",
                "    model.get_submodule(name).register_parameter('bias', None)",
            ),
        )


def not_torchs(examination: Examination) -> Iterator[Finding]:
    """Find modules that have running statistics and are not torch's BatchNorm."""
    every = lookalikes(named_paths(examination.model))
    # Frozen by their kind, under the names that libraries give them: nothing moves there.
    found = {name: module for name, module in every.items() if "Frozen" not in kind_of(module)}
    if found:
        kinds = ", ".join(sorted({kind_of(module) for module in found.values()}))
        yield Finding(
            "not-torchs",
            "advice",
            tuple(found),
            f"{counted(len(found), 'module')} {'has' if len(found) == 1 else 'have'} running statistics and "
            f"{'is' if len(found) == 1 else 'are'} not torch's BatchNorm: {kinds}.",
            "Nothing in this package freezes, recalibrates or measures them, and SyncBatchNorm does not replace them.",
            lines(
                "# torch.nn.BatchNorm2d in their place, or to freeze them, after every model.train():",
                f"for name in {[*found]!r}:",
                "    model.get_submodule(name).eval()",
            ),
        )
