"""What callbacks left in a checkpoint of a real fit is shown in words."""

import warnings
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_bn
from lightning_bn import BatchNormFreezer, BatchNormMonitor, PreciseBatchNorm, TaskBatchNorm
from tests.models import SmallResNet, images


class InspectedModule(pl.LightningModule):
    """Trains a small network, each batch under the name of a task where there are any."""

    def __init__(self, tasks=()):
        super().__init__()
        self.model, self.tasks = SmallResNet(), tasks

    def training_step(self, batch, batch_idx):
        with lightning_bn.task(self.tasks[batch_idx % len(self.tasks)]) if self.tasks else nullcontext():
            return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        with lightning_bn.task(self.tasks[0]) if self.tasks else nullcontext():
            self.model(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, *callbacks, tasks=(), epochs=2):
    pl.seed_everything(0)
    data = TensorDataset(images(48), torch.arange(48) % 2)
    loader = DataLoader(data, batch_size=8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": epochs, "accelerator": "cpu", "enable_checkpointing": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(default_root_dir=folder, callbacks=[*callbacks], **quiet, **options)
    trainer.fit(InspectedModule(tasks), loader, loader)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    freezer = BatchNormFreezer(modules=["model.layer1"], stats=True, affine=True)
    monitor = BatchNormMonitor(every_n_steps=2, warn_above=1e-9)
    with warnings.catch_warnings():
        # Frozen before they were ever trained, and watched below any drift: what is then in the file is under test.
        warnings.simplefilter("ignore")
        return fit(tmp_path_factory.mktemp("fit"), freezer, monitor, PreciseBatchNorm(num_batches=2))


def test_reports_of_the_callbacks_are_in_the_file(checkpoint, found):
    _, said = found("inspect", checkpoint)
    words = said["callbacks"]
    assert set(words) == {"BatchNormFreezer", "BatchNormMonitor", "PreciseBatchNorm"}
    assert words["BatchNormFreezer"] == "4 frozen layers bit-identical over 12 steps."
    assert "samples of drift from fit start, steps 2 to 12" in words["BatchNormMonitor"]
    assert words["PreciseBatchNorm"].startswith(
        "last recalibration at step 12, 2 validations seen; the checkpoint is of"
    )


def test_a_checkpoint_of_lightning_says_when_it_was_saved(checkpoint, found, command):
    _, said = found("inspect", checkpoint)
    assert said["about"] == {"epoch": 2, "global_step": 12, "pytorch-lightning_version": pl.__version__}
    _, text = command("inspect", checkpoint)
    assert f"of pytorch-lightning {pl.__version__}, epoch 2, step 12" in " ".join(text.split())
    assert "- BatchNormFreezer: 4 frozen layers bit-identical over 12 steps." in text


def test_layers_that_were_frozen_since_construction_are_told_to_be_untrained(checkpoint, found):
    code, said = found("inspect", checkpoint)
    [fault] = [one for one in said["findings"] if one["is_fault"]]
    assert code == 1
    assert fault["kind"] == "never updated"
    # Few updates, but PreciseBatchNorm measured: nothing of the initial values is left.
    assert "warming up" not in {one["kind"] for one in said["findings"]}
    assert fault["layers"] == [f"model.layer1.{block}.bn{number}" for block in (0, 1) for number in (1, 2)]


def test_a_checkpoint_that_trained_on_since_the_recalibration_says_so(tmp_path, found):
    path = fit(tmp_path, PreciseBatchNorm(num_batches=2))
    content = torch.load(path, weights_only=True)
    content["global_step"] += 5
    torch.save(content, path)
    assert "its weights have changed since then" in found("inspect", path)[1]["callbacks"]["PreciseBatchNorm"]


def test_statistics_of_tasks_are_listed_and_compared(tmp_path, found):
    path = fit(tmp_path, TaskBatchNorm(["near", "far"]), tasks=("near", "far"))
    _, said = found("inspect", path)
    assert [entry["key"] for entry in said["entries"]] == ["state_dict", "callbacks.TaskBatchNorm.sets.far"]
    assert [entry["role"] for entry in said["entries"]] == ["model", "task"]
    assert "near (in the model's state dict), far (6 updates)" in said["callbacks"]["TaskBatchNorm"]
    code, said = found("tasks", path)
    assert code == 0
    assert said["banks"][0]["updates"] == {"near": 6, "far": 6}


def test_averaged_weights_of_a_fit_are_told_from_those_in_training(tmp_path, found):
    averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging")
    path = fit(tmp_path, averaging.WeightAveraging())
    _, said = found("inspect", path)
    assert [(one["key"], one["role"]) for one in said["entries"]] == [
        ("state_dict", "averaged"),
        ("current_model_state", "in training"),
    ]


def test_a_callback_that_saw_nothing_says_so(tmp_path, found):
    model = nn.Sequential(nn.BatchNorm1d(2))
    callbacks = {"BatchNormFreezer[a]": {"format": 1, "report": {}}, "BatchNormMonitor": {"format": 1}}
    callbacks |= {"PreciseBatchNorm": {"format": 1, "validations": 0, "done_at_step": -1}, "EarlyStopping{}": {"a": 1}}
    torch.save({"state_dict": model.state_dict(), "callbacks": callbacks}, tmp_path / "file.ckpt")
    words = found("inspect", tmp_path / "file.ckpt")[1]["callbacks"]
    assert words == {
        "BatchNormFreezer[a]": "nothing had been frozen yet.",
        "BatchNormMonitor": "no sample of drift yet.",
        "PreciseBatchNorm": "it had not recalibrated yet: the running statistics are the moving average of training.",
    }
