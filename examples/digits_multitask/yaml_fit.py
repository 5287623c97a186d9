"""One of the YAML files run through the LightningCLI, with little changed: seed, folder, which callbacks are on."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning import Callback, Trainer

import cli
from fitting import Curve
from model import DigitsModule

HERE = Path(__file__).parent


def fit_yaml(
    file: str,
    seed: int,
    folder: Path,
    switched_on: Collection[str] = (),
    model: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Curve, Trainer, DigitsModule]:
    """What ``python cli.py fit --config <file>`` does, quietly.

    Args:
        file: Name of the YAML file.
        seed: In place of the file's.
        folder: Where logs and checkpoints go, in place of the file's.
        switched_on: Class names of the callbacks of ``lightning_bn`` to keep; all others of the file stay anyway.
        model: Arguments of the module in place of the file's.
        callbacks: Added to the file's.

    Returns:
        Validation by epoch, the Trainer and the module after the fit.
    """
    config = yaml.safe_load((HERE / file).read_text(encoding="utf-8"))
    config["seed_everything"] = seed
    config["model"].update(model or {})
    trainer = config["trainer"]
    trainer.update(default_root_dir=str(folder), enable_progress_bar=False, enable_model_summary=False)
    trainer["logger"]["init_args"]["save_dir"] = str(folder)
    trainer["callbacks"] = [callback for callback in trainer["callbacks"] if _stays(callback, switched_on)]
    for callback in trainer["callbacks"]:
        if "dirpath" in callback["init_args"]:
            callback["init_args"]["dirpath"] = str(folder / "pretrained")
    curve = Curve()
    run = cli.main({"subcommand": "fit", "fit": config}, callbacks=[*callbacks, curve])
    return curve, run.trainer, run.model


def _stays(callback: Mapping[str, Any], switched_on: Collection[str]) -> bool:
    package, _, name = callback["class_path"].rpartition(".")
    return package != "lightning_bn" or name in switched_on
