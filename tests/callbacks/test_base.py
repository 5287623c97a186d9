"""What all callbacks make of a selection that is left empty in a configuration."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from lightning_bn.functional.layers.patterns import SelectionError
from tests.callbacks.fits import LAYERS, Classifier, quiet, train_loader, val_loader
from tests.pages import callbacks_of

CALLBACKS = ["BatchNormFreezer", "BatchNormMonitor", "PreciseBatchNorm"]


def configured(name: str, line: str, folder: Path) -> Any:
    text = f"trainer:\n  callbacks:\n    - class_path: lightning_bn.{name}\n      init_args:\n        {line}\n"
    return callbacks_of(text, folder, pl)[0]


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("empty", ["[]", "''", "[a, '']"])
def test_empty_list_or_string_is_refused_by_name_before_training(name: str, empty: str, tmp_path: Path) -> None:
    callback = configured(name, f"modules: {empty}", tmp_path)
    trainer = quiet(callbacks=[callback], max_epochs=1)
    with pytest.raises((SelectionError, pl.utilities.exceptions.MisconfigurationException), match="modules"):
        trainer.fit(Classifier(), train_loader(), val_loader())
    assert trainer.global_step == 0


@pytest.mark.parametrize("line", ["modules:", "modules: null", "exclude:", "root: ''"])
def test_line_without_a_value_is_as_if_it_were_not_there(line: str, tmp_path: Path) -> None:
    # LightningCLI hands both on as None, and writes "modules: null" itself into the configuration that it saves.
    plan = configured("BatchNormFreezer", line, tmp_path).plan(Classifier())
    assert [layer.name for layer in plan.layers] == list(LAYERS)
    assert f"by every layer: {len(LAYERS)}" in str(plan)
