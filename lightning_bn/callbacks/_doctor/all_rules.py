"""All rules about a fit."""

from __future__ import annotations

from lightning_bn.callbacks._doctor import averages, finetuning, in_optimizers, processes, recalibrated
from lightning_bn.functional.doctor.all_rules import Rule

FIT_RULES: tuple[Rule, ...] = (
    Rule(
        "frozen-by-finetuning",
        "`BaseFinetuning` with `train_bn=False`",
        "fault",
        "trainer",
        finetuning.frozen_by_finetuning,
    ),
    Rule(
        "skipped-when-unfrozen",
        "layers of equal values that `BaseFinetuning` takes for one when it unfreezes them",
        "advice",
        "trainer",
        finetuning.skipped_when_unfrozen,
    ),
    Rule(
        "not-in-optimizer",
        "layers that train, or are to be unfrozen, in no optimizer",
        "fault",
        "trainer",
        in_optimizers.not_in_optimizer,
    ),
    Rule(
        "affine-under-weight-decay",
        "weight and bias that an optimizer decays",
        "advice",
        "trainer",
        in_optimizers.affine_under_weight_decay,
    ),
    Rule(
        "averaged-without-recalibration",
        "averages of weights (EMA, SWA) without `PreciseBatchNorm`",
        "fault",
        "trainer",
        averages.averaged_without_recalibration,
    ),
    Rule(
        "noise-in-recalibration",
        "dropout that containers apply by their own flag while `PreciseBatchNorm` runs",
        "fault",
        "trainer",
        recalibrated.noise_in_recalibration,
    ),
    Rule(
        "not-synchronized",
        f"several processes with at most {processes.FEW_SAMPLES} samples each, and no SyncBatchNorm",
        "fault",
        "trainer",
        processes.not_synchronized,
    ),
    Rule(
        "synchronized-alone", "SyncBatchNorm in a fit of one process", "advice", "trainer", processes.synchronized_alone
    ),
)
