"""Population statistics from batches (precise BN), written into the layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bn.functional._batches import default_forward, model_device
from lightning_bn.functional._checks import check_choice, check_flag, check_positive
from lightning_bn.functional._random import generator_states
from lightning_bn.functional.distributed.agreement import agree, layer_facts, tell_failure
from lightning_bn.functional.distributed.lockstep import Lockstep
from lightning_bn.functional.layers.names import LayerNames
from lightning_bn.functional.layers.patterns import Patterns
from lightning_bn.functional.layers.properties import is_synchronized
from lightning_bn.functional.layers.selection import LayerSelection
from lightning_bn.functional.layers.sets_per_task import homes_of, sets_for
from lightning_bn.functional.recalibration import result
from lightning_bn.functional.recalibration.across_processes import across_processes
from lightning_bn.functional.recalibration.collection import TaskOf, collecting_parts, no_task_told, parts_of
from lightning_bn.functional.recalibration.isolation import isolated_statistics
from lightning_bn.functional.recalibration.population import Estimator, Population
from lightning_bn.functional.recalibration.result import Recalibration
from lightning_bn.functional.recalibration.rewriting import Rewriting, without_layers
from lightning_bn.functional.recalibration.run import CollectionRun
from lightning_bn.functional.recalibration.stopping import StoppingRule
from lightning_bn.functional.recalibration.targets import targets_of
from lightning_bn.functional.statistics.channels import ChannelLayout


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    modules: Patterns = None,
    exclude: Patterns = None,
    root: str = "",
    forward: Callable[[Any, Any], Any] | None = None,
    task_of: TaskOf | None = None,
    num_batches: int | None = None,
    num_samples: int | None = None,
    max_standard_error: float | None = None,
    estimator: Estimator = "pooled",
    prior: float | None = None,
    containers_in_eval: bool | None = None,
    distributed: bool = False,
) -> Recalibration:
    """Replace running statistics by those of the population that ``batches`` are drawn from, with the weights of now.

    Every batch is run forward once, without gradients, each layer normalizing with the batch as in training. What a
    layer sees is pooled over all batches, positions and uses in float64; the mean and the unbiased variance of the
    pooled values are written in place, ``num_batches_tracked`` stays. Everything else is afterwards as it was, also
    after a failure, which leaves the statistics as they were too: modes, momentum, hooks, other buffers, random number
    generators, gradients.

    Rewritten are the selected layers except those that were frozen through this package and those in eval inside a
    model in training; where the whole model is in eval, all selected ones. For the pass other leaf modules are in eval
    (no dropout) and containers keep their mode. Of a forward inside the pass counts what training would take for an
    update: not one in eval mode, a teacher's, nor one for which the forward has switched off ``track_running_stats`` or
    set ``momentum`` to 0, or that runs with other buffers (``torch.func.functional_call``).

    Args:
        model: Any module.
        batches: What to feed, for instance a DataLoader. 10^3 to 10^4 samples are near-optimal; batches may be larger
            than in training. It is iterated as it is: while a training draws from a loader, pass another one, with a
            generator and a dataset of its own.
        modules: As for :func:`~lightning_bn.functional.batch_norm_layers`.
        exclude: As for ``batch_norm_layers``.
        root: As for ``batch_norm_layers``.
        forward: Runs the model on one batch: ``forward(model, batch)``. By default the model is called on a tensor, on
            the first element of a tuple or list, or with the items of a dict as keywords. The batch has been moved to
            the model's device. Of a model in DistributedDataParallel it is given the module inside.
        task_of: Returns the task of a batch, where layers have statistics per task
            (:func:`~lightning_bn.functional.tasks.task_statistics`): each task's are then those of its own batches, of
            one pass. Contexts inside the forward count more; with None, and where it returns None, only they tell.
            What runs outside of both is the default task's. The following limits hold for each task, and once for the
            layers without such statistics, which are pooled over all batches: those of tasks that have enough are
            passed over, but for 1,000 in a row, which end the pass.
        num_batches: How many batches at most, in each process; None for all.
        num_samples: How many samples at most, over all processes; None for all.
        max_standard_error: Stop as soon as the standard error of every channel's mean (in standard deviations) and
            variance (relative) is below this, estimated from how far batches lie apart, of which at least 8 are used.
        estimator: ``"pooled"``: one mean and variance of all values. ``"mean_of_batches"``: means of the batches' own
            means and unbiased variances, as ``momentum=None`` and other tools have it; it misses the variance between
            batches.
        prior: How many samples what the layers hold is worth: both means and both variances are averaged, weighted by
            it and by the samples of ``batches``. For a target domain of few samples (16 is a good value, Schneider et
            al. 2020); None for none.
        containers_in_eval: Whether modules with submodules are in eval for the pass as well, which turns off dropout
            and stochastic depth that they call as functions, and also what else a model does in training alone, such
            as a detector's losses. None: they keep their mode, and the result says so where a forward
            draws random numbers.
        distributed: Whether all processes of the default process group take part, each with batches of its own: the
            statistics are then merged and the same on all of them. Every process has to call this. With SyncBatchNorm
            layers, whose forwards wait for each other, all run as many batches as the one that has the fewest.

    Returns:
        What was done; printed, it is one sentence.

    Raises:
        ValueError: If a number is out of range, if a layer is synchronized and ``distributed`` is not set, or with
            ``prior`` if samples cannot be counted.
        RecalibrationError: A ValueError too. AllFrozenError: all selected layers are frozen. NoUsableBatchError: there
            is no batch, or none that can be used, or no selected layer was reached. FailedAloneError: one of these,
            while other processes could go on. WeightsMovedError: the forward wrote to trained weights.
            The base class itself: a layer's statistics cannot be read, because the forward exchanged its buffers or it
            normalizes with others than those of its input.
        SelectionError: As for ``batch_norm_layers``, or if a selected layer has no running statistics, or some of
            another size than its channels.
        TypeError: If ``batches`` is one tensor, or a batch cannot be fed without ``forward``.
        RuntimeError: Under ``distributed``, if another process failed; a DisagreementError if they would do different
            things.

    Source: Wu & Johnson (2021), "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3; Ioffe & Szegedy
    (2015), arXiv 1502.03167, algorithm 2. Pooling follows Chan, Golub & LeVeque (1979); ``prior`` Schneider et al.
    (2020), arXiv 2006.16971, section 3.

    Example:
        >>> data = torch.arange(12.0).reshape(6, 2)
        >>> layer = nn.BatchNorm1d(2)
        >>> result = recalibrate(layer, data.split(2))
        >>> layer.running_mean, layer.running_var
        (tensor([5., 6.]), tensor([14., 14.]))
        >>> result.num_batches, result.num_samples
        (3, 6)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"recalibrate(model, batches): model is a {type(model).__name__}, not a torch.nn.Module; are the two "
            f"swapped?"
        )
    check_flag("distributed", distributed)
    if distributed and not (dist.is_available() and dist.is_initialized()):
        raise ValueError("distributed=True needs torch.distributed's default process group, which is not initialized.")
    started = time.monotonic()
    processes = dist.get_world_size() if distributed else 1
    device = model_device(model)
    with _failure_told(device) if distributed else nullcontext():
        rule = StoppingRule(num_batches, num_samples, max_standard_error, processes)
        _check(batches, estimator, forward=forward, task_of=task_of)
        check_flag("containers_in_eval", containers_in_eval, none="to be told where it matters")
        check_positive("prior", prior, none="to ignore what the layers hold")
        selection, names = LayerSelection(modules, exclude, root), LayerNames(model)
        selected = selection.tracked_layers(model, names)
        targets = targets_of(names.modules, selected, distributed=distributed)
        sets = sets_for(model, selected)
        if sets is None and task_of is not None:
            raise ValueError(
                "task_of is given, but no BatchNorm layer of the model has statistics per task: call task_statistics "
                "first, or leave task_of out."
            )
        parts = parts_of(targets, sets)
        layout = ChannelLayout.of(targets)
        synchronized = [name for name, layer in targets.items() if is_synchronized(layer)]
    if distributed:
        kinds = {f"layer {name!r} is synchronized": True for name in synchronized}
        tasks = {} if sets is None else {"tasks": sets.tasks, "default task": sets.default}
        with_sets = {f"layer {name!r} has statistics per task": True for key in parts if key for name in parts[key]}
        settings = {"estimator": estimator, "num_samples": num_samples, "prior": prior}
        agree({**layer_facts(layout), **kinds, **tasks, **with_sets, **settings}, device)
    lockstep = (
        Lockstep(device, len(parts), () if sets is None else sets.tasks) if synchronized and distributed else None
    )
    run, step = CollectionRun(rule, device, parts, sets, task_of, lockstep), forward or default_forward
    # DDP's own forward exchanges buffers, for which a process with fewer batches would not come.
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    gathered: dict[str | None, Population] | None = None
    drew, told = False, (0, 0)

    def run_batch(batch: Any) -> None:
        nonlocal drew
        # Of the first batch: who draws at all, as dropout and stochastic depth, draws for every one.
        watched = containers_in_eval is None and not run.counts[None].batches
        states = generator_states() if watched else b""
        step(inner, batch)
        drew = drew or (watched and generator_states() != states)

    kept = [] if sets is None else homes_of(names.layers.values(), sets)
    in_eval = bool(containers_in_eval)
    isolated = isolated_statistics(names.modules, targets.values(), containers_in_eval=in_eval, also=kept)
    try:
        with isolated, collecting_parts(parts, sets) as collected:
            run.feed(batches, run_batch, collected)
            gathered, told = collected.populations(), (collected.told, collected.untold)
    finally:
        # Also after a failure here, which the other processes are waiting to hear of.
        counts = run.counts
        if distributed and (lockstep is None or lockstep.settle()):
            eps = {key: tuple(layer.eps for layer in one.values()) for key, one in parts.items()}
            layers = {key: (ChannelLayout.of(one), eps[key]) for key, one in parts.items()}
            gathered, counts, told = across_processes(gathered, layers, counts, device, told)
    if not counts[None].batches and not any(one.reached() for one in gathered.values()):
        raise result.NoUsableBatchError(run.why_nothing())
    if sets is not None and told[1] and not told[0] and len(sets.tasks) > 1:
        raise result.NoUsableBatchError(no_task_told(sets))
    rewritings = {
        key: Rewriting(
            parts[key], one, counts[key], sets, key, estimator=estimator, prior=prior, distributed=distributed
        )
        for key, one in gathered.items()
    }
    if not any(one.written for one in rewritings.values()):
        raise result.NoUsableBatchError(max(rewritings.values(), key=lambda one: one.counts.batches).why_nothing())
    shared = {"requested_batches": num_batches, "processes": processes}
    of_all: dict[str, Any] = {
        **shared,
        "drew_random_numbers": drew,
        "frozen": tuple(name for name in selected if name not in targets),
        "tasks": {key: one.write(**shared) for key, one in rewritings.items() if key is not None},
        "untold_batches": told[1],
    }
    alone = None not in rewritings
    done = without_layers(counts[None], **of_all) if alone else rewritings[None].write(**of_all)
    return replace(done, seconds=time.monotonic() - started)


@contextmanager
def _failure_told(device: torch.device) -> Iterator[None]:
    """Tell the other processes of a failure inside; a refusal that they do not share is an error of its own kind."""
    try:
        yield
    except BaseException as error:
        if tell_failure(device) and isinstance(error, result.RecalibrationError):
            raise result.FailedAloneError(str(error)) from error
        raise


def _check(batches: Any, estimator: str, **functions: Any) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name}={function!r} must be a function or None.")
    check_choice("estimator", estimator, get_args(Estimator))
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}, not an iterable of batches: pass a DataLoader, or [batch] for "
            f"a single one."
        )
