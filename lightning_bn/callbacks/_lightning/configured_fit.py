"""A fit as a YAML file of LightningCLI describes it: made, and not run."""

from __future__ import annotations

import importlib
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_bn.callbacks._lightning.loaders import combined
from lightning_bn.callbacks._lightning.namespaces import LightningModule, Trainer
from lightning_bn.callbacks._lightning.optimizers import attached

_LARGEST = 1 << 22
"""Bytes of a file that is read."""
_OF_SUBCOMMANDS = ("ckpt_path", "weights_only")
_ONE_PROCESS = {"devices": "1", "num_nodes": "1", "strategy": "auto"}
_HERE = {"accelerator": "cpu", "precision": "32-true", **_ONE_PROCESS}
"""Settings of a Trainer that can be made on any machine."""


class ConfigurationError(ValueError):
    """A file that describes no fit, or one that cannot be made here."""


@dataclass(frozen=True)
class ConfiguredFit:
    """What a file describes.

    Attributes:
        module: The model.
        trainer: With the file's callbacks; without its logger.
        datamodule: None without one.
        processes: How many the file asks for, whatever this machine has; None where the Trainer says it.
        synchronized: Whether the file asks for SyncBatchNorm.
    """

    module: LightningModule
    trainer: Trainer
    datamodule: Any
    processes: int | None
    synchronized: bool

    def set_up_data(self) -> None:
        """Prepare the data as a fit does, before :meth:`set_up_module`."""
        if self.datamodule is not None:
            self.datamodule.trainer = self.trainer
            self.trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")

    def set_up_module(self) -> None:
        """Have the module make what it makes in its hooks before a fit, where layers may be made as well."""
        with attached(self.trainer, self.module):
            self.module.prepare_data()
            self.module.setup("fit")
            self.module.configure_model()

    def batches(self, count: int) -> list[Any]:
        """Return the first batches of training, of several loaders as the Trainer combines them."""
        with attached(self.trainer, self.module):
            loaders: Any = (self.module if self.datamodule is None else self.datamodule).train_dataloader()
            with combined(loaders, "max_size_cycle") as batches:
                return list(islice(batches, count))


def configured_fit(path: str, model: Any = None, data: Any = None, *, one_process: bool = False) -> ConfiguredFit:
    """Return the fit that a YAML file describes; of a Trainer that this machine cannot make, one on its CPU.

    Classes are imported and made as the file says, as the command that trains does.

    Args:
        path: Of the file.
        model: The class of the model, where the file does not name it; what LightningCLI takes as ``model_class``.
        data: The same for the datamodule.
        one_process: Whether the Trainer is to be one of a single process, whatever the file asks for.

    Raises:
        ConfigurationError: If the file describes no fit, or one that cannot be made.
    """
    if find_spec("jsonargparse") is None:
        raise ConfigurationError("a configuration needs jsonargparse: pip install 'lightning-bn[cli]'")
    described = _described(path, model, data)
    of_trainer: dict[str, Any] = described.get("trainer") or {}
    errors: list[BaseException] = []
    for settings in (_ONE_PROCESS if one_process else {}, _HERE):
        for namespace in ("pytorch_lightning", "lightning.pytorch"):
            if namespace == "lightning.pytorch" and find_spec("lightning") is None:
                continue
            try:
                made = _made(namespace, path, described, settings, (model, data))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # whatever the user's own code raises
                errors.append(error)
                continue
            here = settings is _HERE
            return ConfiguredFit(
                made.model,
                made.trainer,
                made.datamodule,
                _processes(of_trainer) if here else None,
                bool(of_trainer.get("sync_batchnorm")),
            )
    raise ConfigurationError(f"{path}: {errors[0]}") from errors[0]


def _described(path: str, model: Any, data: Any) -> dict[str, Any]:
    import yaml

    about = Path(path).stat()
    if not stat.S_ISREG(about.st_mode):
        raise ConfigurationError(f"{path} is not a file: name the YAML file that LightningCLI trains from.")
    if about.st_size > _LARGEST:
        raise ConfigurationError(
            f"{path} has {about.st_size:,} bytes, and a configuration has {_LARGEST:,} at most: is it another file?"
        )
    try:
        described = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not YAML: {error}") from error
    if isinstance(described, dict) and isinstance(described.get("fit"), dict):
        # Of a command with subcommands.
        described = described["fit"]
    if not isinstance(described, dict) or "model" not in described:
        raise ConfigurationError(f"{path} has no key 'model': it is not a configuration of LightningCLI.")
    for key, given in (("model", model), ("data", data)):
        value = described.get(key, {"class_path": ""})
        if given is None and value is not None and not (isinstance(value, dict) and "class_path" in value):
            raise ConfigurationError(
                f"{path} has no class_path under '{key}': the command that wrote it knows the class. Name the class "
                f"with --{key} import.path:Class."
            )
    return {key: value for key, value in described.items() if key not in _OF_SUBCOMMANDS}


def _made(
    namespace: str, path: str, described: dict[str, Any], settings: dict[str, str], classes: tuple[Any, Any]
) -> Any:
    """The LightningCLI that has made what is described."""
    cli = importlib.import_module(f"{namespace}.cli")
    others = [f"--trainer.{key}={value}" for key, value in {"logger": "false", **settings}.items()]
    with _file_of(path, described) as file:
        return cli.LightningCLI(
            *classes,
            args=["--config", str(file), *others],
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            parser_kwargs={"exit_on_error": False},
        )


@contextmanager
def _file_of(path: str, described: dict[str, Any]) -> Iterator[Path]:
    """The file itself, or a copy of what it describes of a fit."""
    import yaml

    if yaml.safe_load(Path(path).read_text(encoding="utf-8")) == described:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(path).name
        copy.write_text(yaml.safe_dump(described), encoding="utf-8")
        yield copy


def _processes(settings: dict[str, Any]) -> int:
    """How many processes the settings of a Trainer ask for, as far as they say a number."""
    devices = settings.get("devices", 1)
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
    return max(count, 1) * int(settings.get("num_nodes") or 1)
