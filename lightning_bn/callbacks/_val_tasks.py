"""Which task each loader of an evaluation belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_bn.functional._text import counted

STAGES = ("val", "test", "predict")


class ValTasks:
    """Tasks of the loaders of one evaluation after the other.

    Args:
        given: By ``dataloader_idx``, for all stages alike or by stage; None where nothing is known of loaders.
        tasks: Those that there are.

    Raises:
        ValueError: If a stage or a task is not one of those that there are.
    """

    def __init__(self, given: Sequence[str] | Mapping[str, Sequence[str]] | None, tasks: Sequence[str]) -> None:
        if isinstance(given, str):
            raise ValueError(f"val_tasks={given!r} is a single name: give a list with one name for each loader.")
        by_stage = given if isinstance(given, Mapping) else dict.fromkeys(STAGES, given or None)
        unknown = [stage for stage in by_stage if stage not in STAGES]
        unknown += [task for listed in by_stage.values() for task in listed or () if task not in tasks]
        if unknown:
            raise ValueError(
                f"val_tasks={given!r}: {unknown[0]!r} is neither a stage ({', '.join(STAGES)}) nor a task "
                f"({', '.join(tasks)})."
            )
        self._by_stage = {stage: listed for stage, listed in by_stage.items() if listed is not None}
        self._now: Sequence[str] = ()

    def begin(self, stage: str, loaders: int) -> None:
        """Begin the evaluation of a stage.

        Raises:
            ValueError: If there are other loaders than tasks.
        """
        self._now = self._by_stage.get(stage, ())
        if stage in self._by_stage and len(self._now) != loaders:
            raise ValueError(
                f"val_tasks has {counted(len(self._now), 'task')} for {stage} ({', '.join(self._now)}), but there "
                f"{'is' if loaders == 1 else 'are'} {counted(loaders, 'loader')}: give one task for each loader, in "
                "their order."
            )

    def of(self, loader: int) -> str | None:
        """The task of a loader; None where nothing is known of it."""
        return self._now[loader] if self._now else None
