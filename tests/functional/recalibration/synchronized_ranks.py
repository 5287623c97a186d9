"""Recalibrations of several real processes whose layers are synchronized; what each rank was left with."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bn.functional import describe, freeze_batch_norm, plan, recalibrate
from lightning_bn.functional.distributed.lockstep import Lockstep
from lightning_bn.functional.layers.properties import processes_of
from tests.functional.recalibration.recalibrating_ranks import (
    Broken,
    BrokenLoader,
    counted_collectives,
    equal,
    failing,
    forward_failing,
    long,
    network,
    nonfinite,
    shard,
)
from tests.models import SharedNorm, SmallResNet, state_bits
from tests.oracle import everything, generators
from tests.ranks import take_part
from tests.synced import ReferenceSyncBatchNorm, synchronized

#: Gives the groups of ranks that are synchronized with each other; None for all in one.
Groups = Callable[[int], list[list[int]]]


def all_together(world: int) -> list[list[int]]:
    return [list(range(world))]


def all_but_the_last(world: int) -> list[list[int]]:
    return [list(range(world - 1)), [world - 1]]


def unequal(rank: int, world: int) -> list[Tensor]:
    # Two steps on rank 0, which all ranks then run.
    return shard(rank, ((3, 8), (7, 4, 9), (2, 30, 5, 6))[rank])


def one_value(rank: int, world: int) -> list[Tensor]:
    return shard(rank, (1, 4, 1) if rank == 1 else (4, 1, 5))


def no_rows(rank: int, world: int) -> list[Tensor]:
    return shard(rank, (0, 4, 0) if rank == 1 else (4, 3, 5))


def in_half(rank: int, world: int) -> list[Tensor]:
    return [batch.bfloat16() for batch in equal(rank, world)]


def switched_off() -> nn.Module:
    model = network()
    for name in ("bn1", "layer1.1.bn2"):
        model.get_submodule(name).track_running_stats = False  # type: ignore[assignment]
    return model


#: Name -> the model, the batches of each rank, the groups, layers that stay plain, and what recalibrate is given.
Scenario = tuple[Callable[[], nn.Module], Callable[[int, int], list[Tensor]], Groups, tuple[str, ...], dict[str, Any]]
RIGHT: dict[str, Scenario] = {
    "equal": (network, equal, all_together, (), {}),
    "unequal": (network, unequal, all_together, (), {}),
    "groups": (network, equal, all_but_the_last, (), {}),
    "some plain": (network, unequal, all_together, ("bn1", "layer2.0.bn1", "head.bn"), {}),
    "one value on a rank": (network, one_value, all_together, (), {}),
    "no rows on a rank": (partial(network, SharedNorm), no_rows, all_together, (), {}),
    "non-finite": (network, nonfinite, all_together, (), {}),
    "used several times": (partial(network, SharedNorm), unequal, all_together, (), {}),
    "mean of batches": (network, unequal, all_together, (), {"estimator": "mean_of_batches"}),
    "tracking switched off": (switched_off, equal, all_together, (), {}),
    "one value, tracking switched off": (switched_off, one_value, all_together, (), {}),
    "half": (partial(network, SmallResNet, torch.bfloat16), in_half, all_together, (), {}),
    "some of them": (network, equal, all_together, (), {"modules": ["layer1", "head"]}),
    "num_batches": (network, equal, all_together, (), {"num_batches": 2}),
    "num_samples": (network, unequal, all_together, (), {"num_samples": 11}),
    "max_standard_error": (partial(network, SharedNorm), long, all_together, (), {"max_standard_error": 0.05}),
    "max_standard_error in groups": (
        partial(network, SharedNorm),
        long,
        all_but_the_last,
        (),
        {"max_standard_error": 0.05},
    ),
}


def built(scenario: Scenario, device: str) -> tuple[nn.Module, list[Tensor], dict[str, Any]]:
    build, shards, groups, but, options = scenario
    rank, world = dist.get_rank(), dist.get_world_size()
    # Every process calls for every group.
    made = [dist.new_group(ranks) for ranks in groups(world)]
    mine = next(group for group, ranks in zip(made, groups(world), strict=True) if rank in ranks)
    group = None if len(made) == 1 else mine
    return synchronized(build(), group, but, device), [batch.to(device) for batch in shards(rank, world)], options


def run_right(name: str, device: str) -> dict[str, Any]:
    model, batches, options = built(RIGHT[name], device)
    random_before, flags = generators(), [module.training for module in model.modules()]
    of_layers = ReferenceSyncBatchNorm.collectives
    with counted_collectives() as called:
        result = recalibrate(model, batches, distributed=True, **options)
    return {
        "state": {key: value.cpu() for key, value in model.state_dict().items()},
        "bits": state_bits(model),
        "layers": list(result.layers),
        "processes": {one.name: one.processes for one in describe(model)},
        "planned": {one.name: one.processes for one in plan(model).layers},
        "num_batches": result.num_batches,
        "num_samples": result.num_samples,
        "ended_early": result.ended_early,
        "nonfinite": dict(result.nonfinite),
        "standard_error": result.standard_error,
        "called": called,
        "of_layers": ReferenceSyncBatchNorm.collectives - of_layers,
        "undisturbed": random_before == generators() and flags == [module.training for module in model.modules()],
    }


def fault(name: str, model: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    """What rank 1 gives recalibrate instead; it may change the model first."""
    if name == "loader raises":
        return {"batches": failing(batches, 1, Broken("broken loader"))}
    if name == "loader raises at once":
        return {"batches": failing(batches, 0, Broken("broken loader"))}
    if name == "loader cannot be started":
        return {"batches": BrokenLoader()}
    if name == "batch cannot be moved":
        return {"batches": [batches[0], Immovable()]}
    if name == "no data":
        return {"batches": []}
    if name == "all frozen":
        freeze_batch_norm(model)
    if name == "some frozen":
        freeze_batch_norm(model, "layer2")
    if name == "a plain layer":
        model.bn1 = nn.BatchNorm2d(4, dtype=torch.float64)
    if name == "forward raises":
        return {"forward": forward_failing(2, Broken("broken forward"))}
    return {}


class Immovable(dict[str, Any]):
    """A batch that cannot be moved to a device."""

    def items(self) -> Any:
        raise Broken("cannot be moved")


FAULTS = [
    "loader raises",
    "loader raises at once",
    "loader cannot be started",
    "batch cannot be moved",
    "no data",
    "all frozen",
    "some frozen",
    "a plain layer",
    "not distributed",
]
STRANDING = ["forward raises"]


def run_fault(name: str, device: str) -> dict[str, Any]:
    model, batches, _ = built(RIGHT["equal"], device)
    arguments: dict[str, Any] = {"batches": batches, "distributed": name != "not distributed"}
    if dist.get_rank() == 1:
        arguments.update(fault(name, model, batches))
    before, random_before = everything(model), generators()
    told, started = "", time.monotonic()
    try:
        recalibrate(model, **arguments)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    return {
        "told": told,
        "seconds": time.monotonic() - started,
        "unchanged": everything(model) == before and random_before == generators(),
    }


def run_votes() -> dict[str, Any]:
    """What a lockstep decides on what the ranks say, and a layer whose group this rank is not in."""
    rank, world, device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    first = rank == 0
    votes = {
        "nobody": bool(Lockstep(device).go_on(False, [False], [5], None)),
        "one has ended": bool(Lockstep(device).go_on(first, [False], [5], None)),
        "one is precise": bool(Lockstep(device).go_on(False, [first], [5], None)),
        "all are precise": bool(Lockstep(device).go_on(False, [True], [5], None)),
        "enough samples": bool(Lockstep(device).go_on(False, [False], [5], 5 * world)),
        "one sample too few": bool(Lockstep(device).go_on(False, [False], [5], 5 * world + 1)),
    }
    others = dist.new_group([0])
    return {**votes, "processes": processes_of(ReferenceSyncBatchNorm(2, others if rank else None))}


def run(device: str, name: str, folder: Path) -> dict[str, Any]:
    if name == "votes":
        return run_votes()
    return run_right(name, device) if name in RIGHT else run_fault(name, device)


def main(device: str) -> None:
    take_part(partial(run, device), ["votes", *FAULTS, *RIGHT], STRANDING)


if __name__ == "__main__":
    main("cpu")
