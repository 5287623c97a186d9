"""Settings of a monitor, looked at before anything is measured."""

from __future__ import annotations

from pathlib import Path

from lightning_bn.functional._checks import check_choice, check_positive, check_whole
from lightning_bn.functional.statistics.drift_measures import MEASURES

REFERENCES = ("fit_start", "previous_epoch", "recalibrated")


def check_settings(
    every_n_steps: int, measure: str, reference: str, warn_above: float | None, act_above: float | None
) -> None:
    """Raise where a setting is out of range, or two contradict each other.

    Raises:
        ValueError: With the name, the value and what is wanted.
    """
    check_choice("measure", measure, MEASURES)
    is_path = isinstance(reference, str | Path)
    if reference not in REFERENCES and not (is_path and str(reference) and Path(reference).exists()):
        raise ValueError(
            f"reference={reference!r} must be one of {', '.join(REFERENCES)} or the path of a checkpoint, and there is "
            f"no such file."
        )
    try:
        check_whole("every_n_steps", every_n_steps, 1)
    except ValueError as error:
        raise ValueError(f"{error} The layers to measure are named with modules=.") from None
    check_positive("warn_above", warn_above, none="for no warning")
    check_positive("act_above", act_above, none="for no action")
    if warn_above is not None and act_above is not None and warn_above > act_above:
        raise ValueError(
            f"warn_above={warn_above:g} is above act_above={act_above:g}: it would act before it warns. Make "
            "warn_above smaller, or leave it out."
        )
