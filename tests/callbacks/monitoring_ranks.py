"""Monitored fits on two real processes over gloo: what each rank said and where it ended."""

import warnings
from pathlib import Path
from typing import Any

from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from lightning_bn.callbacks.monitor import BatchNormDriftError
from tests.callbacks.fits import quiet, samples, train_loader, val_loader
from tests.callbacks.freezing_ranks import Processes
from tests.callbacks.monitoring_fits import TamperedClassifier, monitor, norms, pretrained
from tests.ranks import take_part
from tests.synced import ReferenceSync

BATCHES = 24


class TamperedByRank(TamperedClassifier):
    """Rank 1 sees images that are shifted, from a step on."""

    def __init__(self, shift: float, start: int = 0) -> None:
        super().__init__(pretrained(), lr=1e-3)
        self.shift, self.start = shift, start
        self.reset_at = -1
        self.fault = self._shifted

    def _shifted(self, x: Tensor, step: int) -> Tensor:
        if self.shift == float("inf"):
            # One batch, so that its own step stays finite.
            return x * self.shift if self.global_rank == 1 and step == max(self.start, 5) else x
        if self.reset_at == step and self.global_rank == 1:
            for layer in norms(self):
                layer.reset_running_stats()
        return x + self.shift if self.global_rank == 1 and step >= self.start else x


def run(name: str, folder: Path) -> dict[str, Any]:
    """One fit of this rank."""
    acting = name.split(",", maxsplit=1)[0] if name.startswith(("stop", "raise")) else None
    shift = {"alike": 0.0, "other reset": 0.0, "stop, not finite": float("inf"), "other not finite": float("inf")}.get(
        name, 8.0
    )
    module = TamperedByRank(shift, start=6 if acting else 0)
    module.reset_at = 5 if name == "other reset" else -1
    watching = monitor(act_above=1.5 if acting else None, action=acting or "warn")
    small = name.startswith("small")
    if small:
        module.shift = 0.0
    trainer = quiet(
        callbacks=[watching],
        strategy=DDPStrategy(
            # Where buffers are broadcast before a forward, rank 1 drifts by one batch at most.
            cluster_environment=Processes(),
            process_group_backend="gloo",
            broadcast_buffers=acting is None and name != "other reset",
        ),
        devices=2,
        max_epochs=1,
        limit_train_batches=BATCHES,
        plugins=[ReferenceSync()] if "synchronized" in name else None,
        num_sanity_val_steps=0,
    )
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(
                module,
                train_loader(samples(2 * 8 * BATCHES), batch_size={"small": 2, "small, synchronized": 1}.get(name, 8)),
                val_loader(),
            )
        except BatchNormDriftError as raised:
            error = str(raised)
    return {
        "said": [str(one.message) for one in caught if str(one.message).startswith("BatchNormMonitor")],
        "steps": trainer.global_step,
        "planned": BATCHES,
        "error": error,
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("bn/")},
    }


if __name__ == "__main__":
    take_part(
        run,
        [
            "other data",
            "alike",
            "other not finite",
            "other reset",
            "small",
            "small, synchronized",
            "stop",
            "stop, not finite",
            "raise",
        ],
        [],
    )
