"""Recalibrations of several real processes; what each rank was left with, for the tests to compare."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bn.functional import freeze_batch_norm, recalibrate
from tests.models import Broken, SharedNorm, SmallResNet, bits, fill_statistics, images, seeded, state_bits
from tests.oracle import everything, generators
from tests.ranks import take_part

Shards = Callable[[int, int], list[Any]]


class Branches(nn.Module):
    """`used` always runs, `rare` where a batch asks for it, `spare` never."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.rare, self.spare = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x: Tensor, rare: bool = False) -> Tensor:
        return self.used(x) + (self.rare(x + 1) if rare else 0)


class ThreeDtypes(nn.Module):
    """Layers of three dtypes, in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.BatchNorm2d(3), nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).bfloat16()
        self.d, self.e = nn.BatchNorm2d(2), nn.BatchNorm2d(1).double()

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.a(x), self.b(2 * x.double()), self.c(x.bfloat16()), self.d(x[:, :2]), self.e(x[:, :1].double()))
        return sum(part.float().sum() for part in parts)  # type: ignore[return-value]


def many_layers() -> nn.Module:
    return nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(100)))


def network(build: Callable[[], nn.Module] = SmallResNet, dtype: torch.dtype | None = torch.float64) -> nn.Module:
    """The same on every rank, and in the test."""
    model = fill_statistics(seeded(build))
    return model if dtype is None else model.to(dtype)


def drifted() -> nn.Module:
    """Its statistics differ between ranks, as moving averages do; the weights are the same."""
    model, rank = network(), dist.get_rank() if dist.is_initialized() else 0
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(rank)
    return model


def shard(rank: int, sizes: tuple[int, ...], **kwargs: Any) -> list[Tensor]:
    """Batches of the rank's own; each rank's values lie elsewhere."""
    kwargs = {"dtype": torch.float64, **kwargs}
    return [images(size, seed=1000 * rank + index, **kwargs) + rank for index, size in enumerate(sizes)]


def equal(rank: int, world: int) -> list[Tensor]:
    return shard(rank, (8, 8, 8))


def unequal(rank: int, world: int) -> list[Tensor]:
    return shard(rank, ((3, 8, 5, 16, 2), (7,), (2, 30))[rank])


def empty(rank: int, world: int) -> list[Tensor]:
    return [] if rank == world - 1 else shard(rank, (4, 9, 3))


def only_one(rank: int, world: int) -> list[Tensor]:
    return shard(rank, (4, 9, 3)) if rank == 0 else []


def skipping(rank: int, world: int) -> list[Tensor]:
    return shard(rank, (4, 1, 3, 1) if rank == 1 else (4, 5))


def nonfinite(rank: int, world: int) -> list[Tensor]:
    found = shard(rank, (4, 5, 6))
    if rank == 1:
        found[1] = torch.full_like(found[1], torch.nan)
    return found


def one_branch(rank: int, world: int) -> list[Any]:
    return [{"x": batch, "rare": rank == world - 1} for batch in shard(rank, (4, 9))]


def far(rank: int, world: int) -> list[Tensor]:
    # A mean of about a thousand standard deviations.
    return [batch + 2000 for batch in shard(rank, (8, 3, 20))]


def single(rank: int, world: int) -> list[Tensor]:
    return shard(rank, (8,))


def long(rank: int, world: int) -> list[Tensor]:
    return [images(8, seed=1000 * rank + index, dtype=torch.float64) for index in range(120)]


#: Name -> the model, the batches of each rank, and what recalibrate is given besides.
RIGHT: dict[str, tuple[Callable[[], nn.Module], Shards, dict[str, Any]]] = {
    "equal": (network, equal, {}),
    "unequal": (network, unequal, {}),
    "an empty rank": (network, empty, {}),
    "an empty rank, in DDP": (network, empty, {}),
    "one rank has all": (network, only_one, {}),
    "a skipped batch": (network, skipping, {}),
    "non-finite": (network, nonfinite, {}),
    "a layer reached on one rank": (lambda: network(Branches), one_branch, {}),
    "far from zero": (lambda: network(SharedNorm), far, {}),
    "used several times": (lambda: network(SharedNorm), unequal, {}),
    "mean of batches": (network, unequal, {"estimator": "mean_of_batches"}),
    "float32": (lambda: network(dtype=None), lambda r, w: [b.float() for b in unequal(r, w)], {}),
    "several dtypes": (lambda: network(ThreeDtypes, None), lambda r, w: [b.float() for b in equal(r, w)], {}),
    "a hundred layers": (lambda: network(many_layers), equal, {}),
    "some of them": (network, equal, {"modules": ["layer1", "head"]}),
    "num_samples": (network, long, {"num_samples": 96}),
    "num_batches": (network, unequal, {"num_batches": 2}),
    "max_standard_error": (lambda: network(SharedNorm), long, {"max_standard_error": 0.02}),
    "prior": (drifted, unequal, {"prior": 16}),
    "one batch each": (lambda: network(SharedNorm), single, {}),
}


def failing(batches: list[Tensor], after: int, error: BaseException) -> Iterator[Tensor]:
    yield from batches[:after]
    raise error


def forward_failing(at: int, error: BaseException) -> Callable[[nn.Module, Any], Any]:
    calls = 0

    def forward(model: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        out = model.bn1(model.conv1(batch)) if calls == at else model(batch)
        if calls == at:
            raise error
        return out

    return forward


class BrokenLoader:
    """Cannot be started."""

    def __iter__(self) -> Iterator[Tensor]:
        raise Broken("no such dataset")


def fault(name: str, model: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    """What rank 1 gives recalibrate instead; it may break the model first."""
    if name == "forward raises":
        return {"forward": forward_failing(2, Broken("broken forward"))}
    if name == "forward is interrupted":
        return {"forward": forward_failing(1, KeyboardInterrupt())}
    if name == "loader raises":
        return {"batches": failing(batches, 1, Broken("broken loader"))}
    if name == "loader raises at once":
        return {"batches": failing(batches, 0, Broken("broken loader"))}
    if name == "loader cannot be started":
        return {"batches": BrokenLoader()}
    if name == "all frozen":
        freeze_batch_norm(model)
    if name == "some frozen":
        freeze_batch_norm(model, "layer2")
    if name == "nothing selected":
        return {"modules": "laier1"}
    if name == "others selected":
        return {"modules": "layer1"}
    if name == "other channels":
        model.head.bn = nn.BatchNorm1d(5, dtype=torch.float64)
    if name == "another order":
        model._modules = dict(reversed(model._modules.items()))
    if name == "other samples asked for":
        return {"num_samples": 16}
    if name == "another estimator":
        return {"estimator": "mean_of_batches"}
    if name == "a bad number":
        return {"num_batches": 0}
    if name == "no iterable":
        return {"batches": batches[0]}
    return {}


FAULTS = [
    "another order",
    "other samples asked for",
    "forward raises",
    "forward is interrupted",
    "loader raises",
    "loader raises at once",
    "loader cannot be started",
    "all frozen",
    "some frozen",
    "nothing selected",
    "others selected",
    "other channels",
    "another estimator",
    "nobody has data",
]
STRANDING = ["a bad number", "no iterable"]
_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "all_gather_into_tensor",
    "broadcast",
    "broadcast_object_list",
    "reduce",
    "reduce_scatter",
    "gather",
    "scatter",
    "barrier",
    "send",
    "recv",
)


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[str]]:
    """The names of the collectives called inside, in order; those that one calls itself are not counted twice."""
    called: list[str] = []
    real = {name: getattr(dist, name) for name in _COLLECTIVES}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return real[name](*args, **kwargs)

        return call

    for name in _COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield called
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def run_right(name: str, rank: int, world: int) -> dict[str, Any]:
    build, shards, options = RIGHT[name]
    model = build()
    random_before, flags = generators(), [module.training for module in model.modules()]
    with counted_collectives() as called:
        whole = nn.parallel.DistributedDataParallel(model) if name == "an empty rank, in DDP" else model
        called.clear()
        result = recalibrate(whole, shards(rank, world), distributed=True, **options)
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "bits": state_bits(model),
        "before": {"mean": bits(result.before.mean), "var": bits(result.before.var)},
        "layers": list(result.layers),
        "unreached": list(result.unreached),
        "frozen": list(result.frozen),
        "nonfinite": dict(result.nonfinite),
        "num_batches": result.num_batches,
        "num_samples": result.num_samples,
        "skipped": result.skipped_batches,
        "standard_error": result.standard_error,
        "processes": result.processes,
        "ended_early": result.ended_early,
        "said": str(result),
        "collectives": called,
        "undisturbed": random_before == generators() and flags == [module.training for module in model.modules()],
    }


def run_fault(name: str, rank: int, world: int) -> dict[str, Any]:
    model = network().train()
    batches = [] if name == "nobody has data" else equal(rank, world)
    arguments: dict[str, Any] = {"batches": batches}
    if rank == 1:
        arguments.update(fault(name, model, batches))
    before, random_before = everything(model), generators()
    told, started = "", time.monotonic()
    try:
        recalibrate(model, distributed=True, **arguments)
    except (Exception, KeyboardInterrupt) as error:
        told = f"{type(error).__name__}: {error}"
    return {
        "told": told,
        "seconds": time.monotonic() - started,
        "unchanged": everything(model) == before and random_before == generators(),
        "bits": state_bits(model),
    }


def run(name: str, folder: Path) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    return run_right(name, rank, world) if name in RIGHT else run_fault(name, rank, world)


if __name__ == "__main__":
    # Right ones at the end again: a failure leaves nothing behind in the process group.
    take_part(run, ["equal", *FAULTS, *RIGHT], STRANDING)
