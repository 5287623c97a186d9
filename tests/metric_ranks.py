"""The metric on several real processes: what each rank computed, before and after they exchanged."""

from pathlib import Path
from typing import Any

import torch

from lightning_bn import BatchNormDrift
from tests.functional.statistics.test_drift_measures import layer_with
from tests.ranks import take_part

#: Means and variances that each rank's layer has at each of its updates; rank 1 has one update more, rank 2 none.
BY_RANK = [[([0.5, 0.0], [1.0, 2.0])], [([0.0, 1.0], [1.0, 1.0]), ([0.0, 3.0], [4.0, 0.5])], []]


def run(name: str, folder: Path) -> dict[str, Any]:
    """One rank's metric."""
    metric = BatchNormDrift(layer_with([0.0, 0.0], [1.0, 1.0]), threshold=0.5)
    gathered = 0

    def gather(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        nonlocal gathered
        gathered += 1
        return gather_all_tensors(tensor, group)

    from torchmetrics.utilities.distributed import gather_all_tensors

    metric.dist_sync_fn = gather
    rank = torch.distributed.get_rank()
    for mean, var in BY_RANK[rank]:
        metric.update(layer_with(mean, var))
    computed = {key: float(value) for key, value in metric.compute().items()}
    return {"computed": computed, "gathered": gathered, "own": metric.layers()}


if __name__ == "__main__":
    take_part(run, ["one"], [])
