"""Code of a user of the doctor's command, and the command run on it."""

from pathlib import Path
from typing import Any

import yaml

from lightning_bn._cli.main import main

CODE = """
from collections import OrderedDict
import torch, pytorch_lightning as pl
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Planted(pl.LightningModule):
    def __init__(self, half: bool = False, lr: float = 0.1, fails: bool = False, says: bool = False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        if half:
            self.net[1].requires_grad_(False)
        if says:
            print("made")
        self.lr, self.fails = lr, fails

    def training_step(self, batch, batch_idx):
        if self.fails:
            raise RuntimeError("no camera")
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 16, shift: float = 0.0):
        super().__init__()
        self.batch_size, self.shift = batch_size, shift

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 4, generator=generator)
        x[:16] += self.shift
        self.data = TensorDataset(x, torch.arange(64) % 2)

    def train_dataloader(self):
        return DataLoader(self.data, self.batch_size)


class InSetup(Planted):
    def __init__(self, fails_there: bool = False):
        super().__init__(half=True)
        self.net, self.made, self.fails_there = None, self.net, fails_there

    def setup(self, stage):
        if self.fails_there:
            raise LookupError("no vocabulary")
        assert self.net is None
        assert len(self.trainer.datamodule.data) == 64
        self.__dict__["shown"], self.net = stage, self.made


class InConfigureModel(Planted):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        assert self.net is None
        self.net = Planted(half=True).net


class Leaves(BaseException):
    pass


class LeavesIn(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x):
        raise Leaves("for good")


def build():
    return Planted().net


def leaves():
    raise Leaves("for good")


def generator_exit():
    raise GeneratorExit("early")


def meta():
    return build().to("meta")


def colored():
    net = nn.Sequential()
    net.add_module("\x1b[31mred\x07", nn.BatchNorm1d(4))
    return net.requires_grad_(False)


def wide():
    return nn.Sequential(OrderedDict({"\u5c64" * 30: nn.BatchNorm1d(4)})).requires_grad_(False)


class SaysInColor(LeavesIn):
    def forward(self, x):
        raise RuntimeError("\x1b[31mred\x07")


def closes():
    import sys
    sys.stdout.close()
    sys.stderr.close()
    return build()


def prints():
    import os, subprocess, sys
    print("of Python")
    sys.__stdout__.write("of Python below")
    os.system("echo of a shell")
    os.write(1, b"of the system")
    subprocess.run([sys.executable, "-c", "print('of a process')"])
    return build()


def broken():
    raise RuntimeError("no weights")


def number():
    return 3
"""


def ran(*arguments: str) -> int:
    """The exit code of the subcommand with these arguments."""
    return main(["doctor", *arguments])


def configuration(folder: Path, *, model: Any = None, data: Any = None, **trainer: Any) -> str:
    """The path of a YAML as `fit --config` takes it."""
    path = folder / "train.yaml"
    written = {
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False, **trainer},
        "model": {"class_path": "planted_code.Planted", "init_args": model or {}},
        "data": {"class_path": "planted_code.Data", "init_args": data or {}},
    }
    path.write_text(yaml.safe_dump(written))
    return str(path)
