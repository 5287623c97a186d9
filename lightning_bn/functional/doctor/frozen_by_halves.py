"""Layers that were meant to be frozen, and of which one half still moves or no longer fits the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from lightning_bn.functional._text import counted
from lightning_bn.functional.doctor.examination import Examination
from lightning_bn.functional.doctor.finding import Finding
from lightning_bn.functional.doctor.remedies import IN_CONSTRUCTION, freeze_lines, freeze_yaml, lines, set_attribute
from lightning_bn.functional.doctor.teachers import layers_of_teachers
from lightning_bn.functional.layers.properties import affine_parameters, has_running_statistics
from lightning_bn.functional.layers.status import layer_status

_TWO_WAYS = (
    "Training then normalizes with each batch and evaluation with running statistics that do not follow: the two "
    "modes are different functions, and the loss of training says nothing about validation."
)


def frozen_by_requires_grad(examination: Examination) -> Iterator[Finding]:
    """Find layers whose weight and bias require no gradient while their running statistics move."""
    leftover = _left_by_2d_only(examination)
    found = [name for name in _moving_without_gradient(examination) if name not in leftover]
    teachers = layers_of_teachers(examination.model) if found else set()
    own = [name for name in found if name not in teachers]
    if own:
        yield Finding(
            "frozen-by-requires-grad",
            "fault",
            examination.in_order(own),
            f"{_who(own)} frozen by requires_grad only: weight and bias are fixed, the running statistics still move "
            f"with every batch in train mode.",
            "Running statistics are buffers, which no optimizer and no requires_grad touches. A backbone that is "
            "thought to be frozen changes its outputs, and what was trained on it before gets worse.",
            freeze_lines(examination, own),
            freeze_yaml(examination, own),
        )
    copies = [name for name in found if name in teachers]
    if copies:
        yield Finding(
            "frozen-by-requires-grad",
            "advice",
            examination.in_order(copies),
            f"{_who(copies)} frozen by requires_grad only, in a copy of a part that trains: the running statistics "
            f"move with every batch in train mode.",
            "For a teacher that averages a student's weights this may be meant, and many methods do so. A teacher "
            "that is to stay as it was loaded changes its outputs.",
            freeze_lines(examination, copies),
            freeze_yaml(examination, copies),
        )


def tracking_switched_off(examination: Examination) -> Iterator[Finding]:
    """Find layers whose flag was switched off after construction."""
    found = [
        name
        for name, layer in examination.training_layers().items()
        if has_running_statistics(layer) and not layer.track_running_stats
    ]
    if found:
        yield Finding(
            "tracking-switched-off",
            "fault",
            examination.in_order(found),
            f"track_running_stats was switched off in {counted(len(found), 'layer')} after construction, which does "
            f"not freeze: in train mode the batch still normalizes, and the running statistics stand still.",
            _TWO_WAYS,
            lines(
                "# where it was switched off:",
                set_attribute(found, "track_running_stats", True),
                "# and, to freeze:",
                freeze_lines(examination, found),
            ),
        )


def momentum_zero(examination: Examination) -> Iterator[Finding]:
    """Find layers in train mode with a momentum of 0."""
    found = [
        name
        for name, layer in examination.training_layers().items()
        if has_running_statistics(layer) and layer.track_running_stats and layer.momentum == 0
    ]
    if found:
        yield Finding(
            "momentum-zero",
            "fault",
            examination.in_order(found),
            f"{_who(found)} frozen by momentum=0, which does not freeze: in train mode the batch still normalizes, and "
            f"the running statistics stand still.",
            _TWO_WAYS,
            lines(
                IN_CONSTRUCTION,
                set_attribute(found, "momentum", 0.1),
                "# and, to freeze:",
                freeze_lines(examination, found),
            ),
        )


def frozen_2d_only(examination: Examination) -> Iterator[Finding]:
    """Find layers of other dimensions that still train below BatchNorm2d layers that are all frozen."""
    found = _left_by_2d_only(examination)
    if found:
        frozen = [name for name, layer in examination.frozen_layers().items() if isinstance(layer, nn.BatchNorm2d)]
        kinds = " and ".join(sorted({type(examination.layers[name]).__name__ for name in found}))
        yield Finding(
            "frozen-2d-only",
            "fault",
            examination.in_order(found),
            f"all of {counted(len(frozen), 'BatchNorm2d layer')} {'is' if len(frozen) == 1 else 'are'} frozen, and "
            f"{counted(len(found), 'layer')} of another kind ({kinds}) before them still "
            f"{'trains' if len(found) == 1 else 'train'}.",
            "A loop over nn.BatchNorm2d misses BatchNorm1d and BatchNorm3d: the frozen layers keep statistics of "
            "inputs that go on changing.",
            freeze_lines(examination, [*frozen, *found]),
            freeze_yaml(examination, [*frozen, *found]),
        )


def _who(names: Collection[str]) -> str:
    return f"{counted(len(names), 'layer')} {'is' if len(names) == 1 else 'are'}"


def _moving_without_gradient(examination: Examination) -> list[str]:
    return [
        name
        for name, layer in examination.tracking_layers().items()
        if (affine := affine_parameters(layer))
        and not any(parameter.requires_grad for parameter in affine)
        # Whoever froze weight and bias through this package said what of the statistics.
        and not layer_status(layer).affine_frozen_by
    ]


def _left_by_2d_only(examination: Examination) -> set[str]:
    """Layers that train on, are not BatchNorm2d, and feed one that is frozen or require no gradient.

    A head that trains above a frozen backbone feeds none of its layers.
    """
    frozen = [name for name, layer in examination.frozen_layers().items() if isinstance(layer, nn.BatchNorm2d)]
    training = examination.tracking_layers()
    if not frozen or any(isinstance(layer, nn.BatchNorm2d) for layer in training.values()):
        return set()
    traces = () if examination.traces is None else examination.traces.batches
    fed = {
        layer for trace in traces for name in frozen for use in trace.uses.get(name, ()) for layer in use.behind.after
    }
    return (fed | {*_moving_without_gradient(examination)}) & training.keys()
