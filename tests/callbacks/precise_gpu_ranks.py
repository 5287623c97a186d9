"""The synchronized fits of `precise_ranks` with torch's own SyncBatchNorm, both ranks on one accelerator.

Run with "cpu" as a fourth argument they take the reference layer instead, which shows that they run at all.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment
from torch import Tensor

from tests.callbacks import precise_ranks
from tests.callbacks.freezing_ranks import Processes
from tests.callbacks.precise_ranks import SCENARIOS, RankClassifier, freezer, from_target, precise, run_fit, watching
from tests.ranks import take_part
from tests.synced import ReferenceSync


class OneCard(Processes):
    """Each process is the only one of a node of its own, so that all of them have the first device."""

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self.global_rank()


def options(device: str) -> dict[str, Any]:
    """What the Trainer is given: two nodes of one device."""
    synchronized = {"plugins": ReferenceSync()} if device == "cpu" else {"sync_batchnorm": True}
    return {"accelerator": device, "devices": 1, "num_nodes": 2, **synchronized}


def scenarios(device: str) -> dict[str, Any]:
    """Pairs, with and without the callbacks that must not disturb."""
    of = options(device)
    bf16 = {**of, "precision": "bf16-mixed"}
    return {
        "without": (RankClassifier, list, of, {}),
        "with": (RankClassifier, lambda: [precise(), watching()], of, {}),
        "fewer on one": (RankClassifier, lambda: [from_target()], of, {}),
        "frozen, without": (RankClassifier, lambda: [freezer()], of, {}),
        "frozen": (RankClassifier, lambda: [freezer(), precise(), watching()], of, {}),
        "bf16, without": (RankClassifier, list, bf16, {}),
        "bf16": (RankClassifier, lambda: [precise(), watching()], bf16, {}),
    }


def on_cpu(found: Any) -> Any:
    """The same with every tensor on the CPU."""
    if isinstance(found, Tensor):
        return found.cpu()
    if isinstance(found, dict):
        return {key: on_cpu(value) for key, value in found.items()}
    return type(found)(map(on_cpu, found)) if isinstance(found, list | tuple) else found


def run(name: str, folder: Path) -> dict[str, Any]:
    return on_cpu(run_fit(name, folder))


def main(device: str) -> None:
    environment: type[ClusterEnvironment] = OneCard
    precise_ranks.Processes = environment  # type: ignore[assignment, misc]
    SCENARIOS.update(scenarios(device))
    if device != "cpu":
        torch.backends.cudnn.deterministic = True
    take_part(run, list(scenarios(device)), [])


if __name__ == "__main__":
    main("cpu" if sys.argv[4:] == ["cpu"] else "gpu")
