"""What a batch costs whose rows belong to several tasks, beside the same layer with one task.

One layer of 32 x 64 x 56 x 56; rivals take turns. The rows of the tasks alternate, so that none of them lie together.
Whether the allocator gives memory back to the system after each forward is a matter of luck, and doubles the time: with
`MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000` in the environment it does not.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from _results import Results
from _rounds import Clock, asked_device, step_rows
from torch import nn

from lightning_bn.functional import task_statistics

SHAPE = (32, 64, 56, 56)
BASE = "torch's own layer"
TURNS = 40
NOTE = "With the context. Targets: 2.5 in evaluation, 3.5 in training."


def contexts(layer: nn.Module, tasks: int) -> Callable[[], AbstractContextManager[None]]:
    """Returns what begins the context of rows of so many tasks; of none, what does nothing."""
    if not tasks:
        return nullcontext
    names = [f"task {index}" for index in range(tasks)]
    bank = task_statistics(layer, names, start="shared")
    which = [names[row % tasks] for row in range(SHAPE[0])]
    return lambda: bank.rows(which)


def times(clock: Clock, device: torch.device, *, training: bool, grad: bool) -> dict[str, list[float]]:
    """Seconds of a forward, with ``grad`` of its backward too, turn by turn."""
    x = torch.randn(SHAPE, device=device, requires_grad=grad)
    gradient = torch.randn(SHAPE, device=device)
    rivals: dict[str, tuple[nn.Module, Callable[[], AbstractContextManager[None]]]] = {}
    for name, tasks in (
        (BASE, 0),
        (f"{BASE} again", 0),
        *((f"rows of {count} tasks", count) for count in (1, 2, 4, 8)),
    ):
        layer = nn.BatchNorm2d(SHAPE[1], device=device).train(training)
        rivals[name] = (layer, contexts(layer, tasks))
    marks: dict[str, list[tuple[object, object]]] = {name: [] for name in rivals}
    for turn in range(TURNS + 3 + clock.warm_up):
        for name, (layer, begin) in rivals.items():
            start = clock.now()
            with torch.set_grad_enabled(grad), begin():
                out = layer(x)
                if grad:
                    out.backward(gradient)
            end = clock.now()
            x.grad = out = None
            if turn >= 3 + clock.warm_up:
                marks[name].append((start, end))
    return {name: clock.seconds(pairs) for name, pairs in marks.items()}


def main() -> None:
    """Prints the times and writes them to `benchmarks/results/`."""
    device = asked_device()
    clock = Clock(device)
    results = Results("task_rows", "A layer of 32 x 64 x 56 x 56 whose rows belong to several tasks.", device)
    for title, training, grad in (
        ("Evaluation: the forward", False, False),
        ("Evaluation: forward and backward", False, True),
        ("Training: forward and backward", True, True),
    ):
        found = times(clock, device, training=training, grad=grad)
        results.table(title, step_rows(found, BASE, "layer"), note=NOTE)
    results.write()


if __name__ == "__main__":
    main()
