"""What is to be frozen: layers for every batch, layers for the batches of a task, and which values of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bn.functional._checks import check_text
from lightning_bn.functional.freezing.what_can_be_frozen import are_constants, check_freezes, select_to_freeze
from lightning_bn.functional.layers.patterns import Patterns
from lightning_bn.functional.layers.selection import LayerSelection
from lightning_bn.functional.statistics.channels import ChannelLayout

Layers = dict[str, _BatchNorm]


@dataclass(frozen=True)
class FreezeSelection:
    """What is to be frozen; names are resolved when it is asked.

    Attributes:
        modules: As for :func:`~lightning_bn.functional.freeze_batch_norm`. With ``by_task``, None means no layer beside
            the tasks' own.
        exclude: As for ``freeze_batch_norm``; holds for the tasks too.
        root: As for ``freeze_batch_norm``.
        by_task: Further modules for each task, frozen while a batch of that task is trained.
        stats: Whether to freeze running statistics.
        affine: Whether to freeze ``weight`` and ``bias``.
        memory_efficient: As for ``freeze_batch_norm``.

    Raises:
        ValueError: If neither ``stats`` nor ``affine`` is asked for, or ``by_task`` is no mapping.
    """

    modules: Patterns = None
    exclude: Patterns = None
    root: str = ""
    by_task: Mapping[str, Patterns] | None = None
    stats: bool = True
    affine: bool = True
    memory_efficient: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what freezes nothing or cannot be read."""
        check_freezes(stats=self.stats, affine=self.affine)
        are_constants(stats=self.stats, affine=self.affine, memory_efficient=self.memory_efficient)
        if self.by_task is not None and not isinstance(self.by_task, Mapping):
            raise ValueError(f"by_task={self.by_task!r} must give the modules of each task: {{'task': ['path']}}.")
        for task in self.by_task or {}:
            check_text("a task in by_task", task)
        # Each of them refuses what it cannot read.
        self.parts()

    @property
    def constant(self) -> bool:
        """Whether the layers are constants, and keep nothing of their inputs for the backward."""
        return are_constants(stats=self.stats, affine=self.affine, memory_efficient=self.memory_efficient)

    def parts(self) -> dict[str | None, LayerSelection]:
        """Return what is meant for the batches of each task, and under None what is meant for every batch, if any."""
        parts: dict[str | None, LayerSelection] = {}
        if self.modules is not None or not self.by_task:
            parts[None] = LayerSelection(self.modules, self.exclude, self.root)
        for task, modules in (self.by_task or {}).items():
            parts[task] = LayerSelection(modules, self.exclude, self.root, f"by_task[{task!r}]")
        return parts

    def layers(self, model: nn.Module) -> tuple[Layers, dict[str, Layers]]:
        """Return the layers frozen during every batch, and those frozen beside them during the batches of each task.

        Raises:
            SelectionError: As for :func:`~lightning_bn.functional.freeze_batch_norm`.
        """
        found = {
            task: select_to_freeze(model, selection, stats=self.stats, affine=self.affine)
            for task, selection in self.parts().items()
        }
        always = found.pop(None, {})
        return always, {
            task: {name: layer for name, layer in layers.items() if name not in always}
            for task, layers in found.items()
            if task is not None
        }

    def lookalikes(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return what is meant and has running statistics, but is not torch's BatchNorm; it is not frozen."""
        return {name: one for part in self.parts().values() for name, one in part.lookalikes(model).items()}

    def layout(self, model: nn.Module) -> ChannelLayout:
        """Return the channels of all that is frozen, to be compared between processes."""
        always, by_task = self.layers(model)
        of_tasks = {f"{name} in {task}": layer for task, layers in by_task.items() for name, layer in layers.items()}
        return ChannelLayout.of({**always, **of_tasks})

    def settings(self) -> dict[str, Any]:
        """Return what is frozen as strings, lists and dicts, to be compared with those of another run."""
        return {name: _plain(value) for name, value in vars(self).items() if name != "memory_efficient"}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
