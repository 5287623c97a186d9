"""What a training step of the whole network costs: seconds, and memory that its forward keeps for the backward."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median

from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from data import pictures
from lightning_bn.functional import frozen_batch_norm
from network import PretrainedNetwork
from tables import results_table, spread

ROUNDS, BATCH_SIZE = 5, 32
"""Steps of each way, and the pictures of each."""
WAYS: dict[str, dict[str, bool] | None] = {
    "free": None,
    "frozen": {"memory_efficient": False},
    "frozen, memory-efficient": {"memory_efficient": True},
}
"""What BatchNorm does, and how it is frozen."""


@dataclass
class Cost:
    """Of one way.

    Attributes:
        seconds: Of each step, of the processor: what else a machine does counts less.
        kept: Bytes for the backward, in one step.
    """

    seconds: list[float] = field(default_factory=list)
    kept: int = 0


def run(announce: Callable[[str], None]) -> dict[str, Cost]:
    """Steps of each way in turn, so that what else the machine does meets all of them alike."""
    announce("what a step costs")
    network = PretrainedNetwork().train()
    batch = [tensor[:BATCH_SIZE] for tensor in pictures("train").tensors]
    costs = {way: Cost() for way in WAYS}
    for _ in range(ROUNDS):
        for way, cost in costs.items():
            with as_asked(network, WAYS[way]):
                started = time.process_time()
                loss(network, batch).backward()
                cost.seconds.append(time.process_time() - started)
                network.zero_grad()
    for way, cost in costs.items():
        with as_asked(network, WAYS[way]), kept_for_backward(network) as storages:
            loss(network, batch)
        cost.kept = sum(storages.values())
    return costs


def as_asked(network: nn.Module, how: dict[str, bool] | None) -> AbstractContextManager[object]:
    """BatchNorm for a while in one of the ways."""
    return nullcontext() if how is None else frozen_batch_norm(network, root="backbone", **how)


def loss(network: PretrainedNetwork, batch: Sequence[Tensor]) -> Tensor:
    """Of both new tasks, as in training."""
    images, digits, parities = batch
    given = network(images)
    return cross_entropy(given["digit"], digits) + cross_entropy(given["parity"], parities)


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes by storage of all tensors that forwards inside keep for their backward, the model's parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        # What an operation gives and keeps would otherwise keep itself, and never be freed.
        return tensor.detach()

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def table(seeds: Sequence[dict[str, Cost]]) -> Table:
    """One line per way."""
    result = results_table(
        f"4. A training step of the whole network, {BATCH_SIZE} pictures",
        ["BatchNorm"],
        ["kept for\nbackward, MiB", "CPU seconds\na step", "against\nfree"],
    )
    for way in WAYS:
        costs = [of_seed[way] for of_seed in seeds]
        seconds = [median(cost.seconds) for cost in costs]
        ratios = [now / median(of_seed["free"].seconds) for now, of_seed in zip(seconds, seeds, strict=True)]
        result.add_row(way, f"{costs[0].kept / 2**20:.1f}", spread(seconds, 3), spread(ratios, 2))
    return result
