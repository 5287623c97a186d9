"""How often the training forward reaches a layer, and with what: never, twice, with inputs of unlike sources."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_bn.functional._text import counted
from lightning_bn.functional.doctor.examination import Examination
from lightning_bn.functional.doctor.finding import Finding, Severity
from lightning_bn.functional.doctor.remedies import callback_yaml, lines
from lightning_bn.functional.doctor.traces import Use
from lightning_bn.functional.layers.patterns import shortest_paths

UNLIKE = 0.7
"""Distance of the means of two inputs of a layer, in standard deviations, beyond what is chance: a fault."""
DIFFERENT = 0.3
"""Such a distance that is worth an advice."""
CHANCE = 1e-4
"""Probability that one model has any layer with inputs that are said to be unlike though they are not."""
_OF_ONE_SAMPLE = 2.7
"""Distance that is believed where samples are not counted, or batches have one."""


def never_reached(examination: Examination) -> Iterator[Finding]:
    """Find layers in train mode that no forward in train mode reached."""
    traces = examination.traces
    if traces is None or not examination.complete or any(trace.single is not None for trace in traces.batches):
        return
    missed = [name for name in examination.tracking_layers() if name not in traces.reached]
    in_eval = {} if traces.in_eval is None else traces.in_eval.uses
    stale, unused = [name for name in missed if name in in_eval], [name for name in missed if name not in in_eval]
    if stale and traces.skips_at_random:
        forwards = len((*traces.batches, *traces.again, *traces.drawn))
        yield Finding(
            "never-reached",
            "advice",
            examination.in_order(stale),
            f"none of {forwards} forwards in train mode, which leave out layers at random, reached "
            f"{counted(len(stale), 'layer')} that the forward in eval mode reaches.",
            "Rarely reached, its running statistics are those of few batches with weights of long ago, and evaluation "
            "uses them every time.",
            lines("# after training, with all layers in use:", "recalibrate(model, loader, containers_in_eval=True)"),
        )
    elif stale:
        yield Finding(
            "never-reached",
            "fault",
            examination.in_order(stale),
            f"{counted(len(stale), 'layer')} in train mode {'is' if len(stale) == 1 else 'are'} reached by the forward "
            f"in eval mode and never by the one in train mode.",
            "Its running statistics never move, and evaluation uses them: those of construction, or of the weights "
            "that were loaded.",
            lines(
                "# let the training forward run through it, or after training:",
                "recalibrate(model, loader, containers_in_eval=True)",
            ),
        )
    if unused:
        yield Finding(
            "never-reached",
            "advice",
            examination.in_order(unused),
            f"{counted(len(unused), 'layer')} {'is' if len(unused) == 1 else 'are'} not reached by the forward of "
            f"{'this batch' if len(traces.batches) == 1 else 'these batches'}, in train mode or in eval mode"
            f"{f', which ends with an error ({traces.eval_error})' if traces.eval_error else ''}.",
            "If no other batch reaches it, its statistics stay those of construction, its weights do not train, and "
            "DistributedDataParallel ends with unused parameters.",
            lines(
                "# call it in the forward, or take it out:",
                f"for name in {unused!r}:",
                "    model.set_submodule(name, torch.nn.Identity())",
            ),
        )


def reached_twice(examination: Examination) -> Iterator[Finding]:
    """Find layers that a forward updates several times with inputs that are alike."""
    found = [name for name in _updated_twice(examination) if not _unlike(examination, name)]
    if found:
        most = max(len(_updates(uses)) for name in found for uses in examination.uses(name))
        yield Finding(
            "reached-twice",
            "advice",
            examination.in_order(found),
            f"one training forward uses {counted(len(found), 'layer')} {most} times, and moves the running statistics "
            f"each time.",
            "The moving average forgets that much faster, and each use is normalized with statistics of its own in "
            "training and with shared ones in evaluation. With two views of the same data that does little.",
            lines("# for a forward that is not to count:", "with without_updates(model):", "    model(batch)"),
        )


def unlike_inputs(examination: Examination) -> Iterator[Finding]:
    """Find layers that are shared by inputs of unlike sources, in one forward or from batch to batch."""
    apart = {name: far for name in examination.tracking_layers() if (far := _unlike(examination, name))}
    furthest = {name: one for name, one in apart.items() if one > UNLIKE}
    nearer = {name: one for name, one in apart.items() if name not in furthest}
    if furthest:
        yield _of_unlike(examination, furthest, "fault")
    if nearer:
        yield _of_unlike(examination, nearer, "advice")


def _of_unlike(examination: Examination, apart: Mapping[str, float], severity: Severity) -> Finding:
    worst = max(apart, key=apart.__getitem__)
    tasks = [] if examination.traces is None else list(examination.traces.tasks)
    tasks, paths, alone = tasks or ["first", "second"], examination.paths(apart), len(apart) == 1
    return Finding(
        "unlike-inputs",
        severity,
        examination.in_order(apart),
        f"{counted(len(apart), 'layer')} {'is' if alone else 'are'} shared by inputs of unlike sources: in {worst!r} "
        f"their means lie {apart[worst]:.1f} standard deviations apart.",
        "In training each batch is normalized with its own statistics; evaluation uses one moving average of all, "
        "which describes none of the sources. Tasks that alternate or datasets in sequence train well so and validate "
        "badly."
        if severity == "fault"
        else "In training each batch is normalized with its own statistics; evaluation uses one moving average of all, "
        "which is a little off for each of the sources.",
        lines(
            f"Trainer(callbacks=[TaskBatchNorm({tasks!r}, {paths})])",
            "# or without Lightning:",
            f"task_statistics(model, {tasks!r}, {paths})",
            "# or mix the sources in every batch: DataLoader(..., shuffle=True)",
        ),
        callback_yaml("TaskBatchNorm", tasks=tasks, modules=shortest_paths(apart, examination.layers)),
    )


def _updated_twice(examination: Examination) -> list[str]:
    return [
        name
        for name in examination.tracking_layers()
        if not examination.has_sets(name) and any(len(_updates(uses)) > 1 for uses in examination.uses(name))
    ]


def _updates(uses: Sequence[Use]) -> list[Use]:
    return [use for use in uses if use.updates]


def _unlike(examination: Examination, name: str) -> float:
    """How far the inputs of a layer lie apart, in standard deviations, if that is more than chance; else 0."""
    if examination.has_sets(name) or examination.traces is None:
        return 0.0
    uses = [use for of_batch in examination.uses(name) for use in _updates(of_batch)]
    pairs = [(a, b) for i, a in enumerate(uses) for b in uses[:i]]
    samples = min((count for count in examination.traces.samples if count), default=1)
    comparisons = len(pairs) * len(examination.tracking_layers())
    independent = len(uses) / sum(1 / use.independent for use in uses) if uses else 1.0
    found = [far for a, b in pairs if (far := _apart(a, b, samples, independent, comparisons)) > DIFFERENT]
    return max(found, default=0.0)


def _apart(a: Use, b: Use, samples: int, independent: float, comparisons: int) -> float:
    """Distance of two means in standard deviations, without the part that is chance; 0 where all of it may be.

    Assumed for what is chance: samples are independent and nearly normal, as many as the batch has. Of the positions
    within a sample nothing is assumed: they may all be equal.
    """
    sigma2: Tensor = ((a.var + b.var) / 2).clamp(min=1e-24)
    apart2 = (a.mean - b.mean).square() / sigma2
    far2 = float(apart2.mean())
    if samples < 2:
        # Of values of one sample nothing is known of the next, however many positions there are.
        return math.sqrt(far2) if far2 > _OF_ONE_SAMPLE**2 else 0.0
    # Student's t of each channel, with the pooled variance, and the normal variable of the same probability (Wallace,
    # 1959): the tails of t are long where samples are few.
    freedom = 2 * (samples - 1)
    t2 = apart2 * (samples - 1) / 2
    z2 = float((freedom * torch.log1p(t2 / freedom)).mean()) * ((8 * freedom + 1) / (8 * freedom + 3)) ** 2
    # Their mean is that of as many independent ones as the channels vary as.
    half = torch.tensor(independent / 2, dtype=torch.float64)
    by_chance = float(torch.special.gammaincc(half, half * z2))
    if not by_chance * comparisons < CHANCE:
        return 0.0
    # By chance alone the square of the distance is 2 / (samples - 1) on average.
    return math.sqrt(max(far2 - 2 / (samples - 1), 0.0))
