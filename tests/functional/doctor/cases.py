"""For each rule a model that has the fault and one that has not, with what is run."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bn.functional import freeze_batch_norm
from tests.models import SMALL_RESNET_NAMES, FrozenBatchNorm2d, SharedNorm, SmallResNet, fill_statistics, images, seeded


@dataclass(frozen=True)
class Patient:
    """A model and what `diagnose` is given with it.

    Attributes:
        model: Which.
        batch: What is run; None for nothing.
        more: Further batches.
        layers: What a finding must name; empty for any.
    """

    model: nn.Module
    batch: Any = None
    more: list[Any] = field(default_factory=list)
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A rule with two patients, made anew each time.

    Attributes:
        rule: Its name.
        severity: Of its finding.
        ill: Has the fault.
        well: Has it not.
        name: Tells it from others of its rule.
    """

    rule: str
    severity: str
    ill: Callable[[], Patient]
    well: Callable[[], Patient]
    name: str = ""


def values(samples: int = 32, features: int = 4, *, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(samples, features, generator=torch.Generator().manual_seed(seed)) + shift


def trained() -> SmallResNet:
    """A network with statistics, in train mode, without a bias before a layer."""
    net = fill_statistics(seeded(SmallResNet)).train()
    net.head.fc = nn.Linear(4, 4, bias=False)
    return net


def changed(change: Callable[[nn.Module], object], **given: Any) -> Patient:
    net = trained()
    change(net)
    return Patient(net, **given)


class FrozenOfALibrary(FrozenBatchNorm2d):
    """The same under the name that a library gives it."""


class MixedDimensions(nn.Module):
    """Points through a BatchNorm1d, then a map through BatchNorm2d layers, then a head with a BatchNorm1d."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))  # registered first, run last
        self.points = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
        self.map = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        fill_statistics(self)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.points(x).reshape(-1, 16, 4).transpose(1, 2).reshape(-1, 4, 4, 4)
        return self.head(self.map(grid).mean((2, 3)))


def frozen_2d(*, points: bool) -> Patient:
    net = MixedDimensions()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if points:
        net.points.eval()
    return Patient(net, values(512, 3), layers=("points.1",))


class NoisyBackbone(nn.Module):
    """Applies dropout by its own flag; a part with a BatchNorm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(x), 0.2, self.training)


def noisy_backbone(*, container: bool) -> Patient:
    net = fill_statistics(nn.Sequential(NoisyBackbone(), nn.Linear(4, 2)))
    net[0].norm.eval()
    net[0].training = container
    return Patient(net, values(), layers=("0.norm",))


class AttentiveBackbone(nn.Module):
    """A BatchNorm, then attention with dropout inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.BatchNorm1d(4), nn.MultiheadAttention(4, 1, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)[None]
        return self.attention(x, x, x)[0][0]


def attentive_backbone(*, leaves_only: bool) -> Patient:
    net = fill_statistics(nn.Sequential(AttentiveBackbone(), nn.Linear(4, 2)))
    for module in net[0].modules():
        module.training = leaves_only and any(True for _ in module.children())
    return Patient(net, values(), layers=("0.norm",))


def with_teacher(*, in_eval: bool = False) -> nn.Module:
    """A student with a head of its own, and a copy of it without."""
    student = perceptron(nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))[1:]
    teacher = copy.deepcopy(student).requires_grad_(False).train(not in_eval)
    return nn.ModuleDict({"student": student, "head": nn.BatchNorm1d(4), "teacher": teacher})


class LeftOut(nn.Module):
    """A branch that runs in the given modes only."""

    def __init__(self, *, training: bool, evaluation: bool) -> None:
        super().__init__()
        self.trunk, self.branch = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.runs = {True: training, False: evaluation}

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return self.branch(x) if self.runs[self.training] else x


class DropsLayers(nn.Module):
    """Skips its branch in half of the training forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return x if self.training and float(torch.rand(())) < 0.5 else self.branch(x)


class DropsManyLayers(nn.Module):
    """Leaves out each of its blocks in half of the training forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(24))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not self.training or float(torch.rand(())) < 0.5:
                x = block(x)
        return x


class RarelyRuns(LeftOut):
    """A branch that evaluation reaches and training does not, and one that half of the training forwards reach."""

    def __init__(self) -> None:
        super().__init__(training=False, evaluation=True)
        self.other = DropsLayers()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.other(x))


class OfParts(nn.Module):
    """A batch of several loaders, each part through one backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))

    def forward(self, digits: Any, parity: Any) -> Any:
        return self.backbone(digits[0]), self.backbone(parity[0])


def of_parts(shift: float) -> Patient:
    batch = {"digits": (values(), 0), "parity": (values(seed=1, shift=shift), 0)}
    return Patient(OfParts(), batch, layers=("backbone.0",))


class BiasKept(nn.Module):
    """The output of the convolution is put out or kept, so that its bias is not lost."""

    def __init__(self, *, where: str) -> None:
        super().__init__()
        self.conv, self.bn, self.where = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), where

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        if self.where == "attribute":
            self.features = [x]
        return (self.bn(x), {"features": x}) if self.where == "output" else self.bn(x)


class BiasRead(nn.Module):
    """The output of the convolution is read twice, so that its bias is not lost."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.bn(x) + x


def perceptron(*layers: nn.Module) -> nn.Module:
    return fill_statistics(nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), *layers))


CASES = [
    Case(
        "frozen-by-requires-grad",
        "fault",
        lambda: changed(
            lambda net: net.layer1.requires_grad_(False),
            layers=tuple(f"layer1.{i}.bn{j}" for i in (0, 1) for j in (1, 2)),
        ),
        lambda: changed(lambda net: net.layer1.requires_grad_(False).eval()),
    ),
    Case(
        "frozen-by-requires-grad",
        "fault",
        lambda: changed(lambda net: net.requires_grad_(False)),
        lambda: changed(lambda net: freeze_batch_norm(net.requires_grad_(False))),
        "all",
    ),
    Case(
        "frozen-by-requires-grad",
        "fault",
        # layer10 has the same form, and is no student of it
        lambda: changed(lambda net: net.layer2.requires_grad_(False), layers=("layer2.0.bn1", "layer2.0.bn2")),
        lambda: changed(lambda net: net.layer2.requires_grad_(False).eval()),
        "a block like others",
    ),
    Case(
        "frozen-by-requires-grad",
        "advice",
        lambda: Patient(with_teacher(), layers=("teacher.2", "teacher.4")),
        lambda: Patient(with_teacher(in_eval=True)),
        "a teacher",
    ),
    Case(
        "frozen-by-requires-grad",
        "fault",
        lambda: changed(lambda net: (net.eval(), net.layer1.requires_grad_(False))),
        lambda: changed(lambda net: net.requires_grad_(False).eval(), batch=images(1)),
        "for inference",
    ),
    Case(
        "few-values",
        "fault",
        lambda: changed(lambda net: net.eval(), batch=images(4), layers=("head.bn",)),
        lambda: changed(lambda net: net.requires_grad_(False).eval(), batch=images(4)),
        "for inference",
    ),
    Case(
        "tracking-switched-off",
        "fault",
        lambda: changed(lambda net: setattr(net.bn1, "track_running_stats", False), layers=("bn1",)),
        lambda: Patient(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))),
    ),
    Case(
        "momentum-zero",
        "fault",
        lambda: changed(lambda net: setattr(net.bn1, "momentum", 0.0), layers=("bn1",)),
        lambda: changed(lambda net: vars(net.bn1.eval()).update(momentum=0.0)),
    ),
    Case("frozen-2d-only", "fault", lambda: frozen_2d(points=False), lambda: frozen_2d(points=True)),
    Case(
        "initial-statistics-frozen",
        "fault",
        lambda: changed(lambda net: (net.bn1.reset_running_stats(), net.bn1.eval()), layers=("bn1",)),
        lambda: changed(lambda net: net.bn1.eval()),
    ),
    Case(
        "batch-statistics-in-eval",
        "fault",
        lambda: Patient(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), layers=("0",)),
        lambda: Patient(nn.Sequential(nn.BatchNorm1d(4))),
    ),
    Case(
        "statistics-not-finite",
        "fault",
        lambda: changed(lambda net: net.bn1.running_var.fill_(torch.inf), layers=("bn1",)),
        lambda: changed(lambda net: net.bn1.running_var.fill_(1e30)),
    ),
    Case(
        "few-values",
        "fault",
        lambda: changed(lambda net: None, batch=images(7), layers=("head.bn",)),
        lambda: changed(lambda net: None, batch=images(8)),
    ),
    Case(
        "few-values",
        "fault",
        lambda: changed(lambda net: None, batch=images(1), layers=("head.bn",)),
        lambda: changed(freeze_batch_norm, batch=images(1)),
        "a single one",
    ),
    Case(
        "few-values",
        "advice",
        lambda: changed(lambda net: net.head.bn.eval(), batch=images(1), layers=tuple(SMALL_RESNET_NAMES[:-1])),
        lambda: changed(lambda net: net.head.bn.eval(), batch=images(2)),
        "of one sample",
    ),
    Case(
        "batch-norm-after-dropout",
        "fault",
        lambda: Patient(perceptron(nn.Dropout(0.5), nn.BatchNorm1d(4)), values(256), layers=("3",)),
        lambda: Patient(perceptron(nn.BatchNorm1d(4), nn.Dropout(0.5)), values(256)),
    ),
    Case(
        "batch-norm-after-dropout",
        "advice",
        lambda: Patient(
            perceptron(nn.Dropout(0.5), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)), values(256), layers=("4",)
        ),
        lambda: Patient(
            perceptron(nn.Dropout(0.5), nn.LayerNorm(4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)), values(256)
        ),
        "with weights between",
    ),
    Case(
        "dropout-in-frozen-container",
        "fault",
        lambda: noisy_backbone(container=True),
        lambda: noisy_backbone(container=False),
    ),
    Case(
        "dropout-in-frozen-container",
        "fault",
        lambda: attentive_backbone(leaves_only=True),
        lambda: attentive_backbone(leaves_only=False),
        "of attention",
    ),
    Case(
        "never-reached",
        "fault",
        lambda: Patient(LeftOut(training=False, evaluation=True), values(), layers=("branch",)),
        lambda: Patient(DropsLayers(), values()),
        "evaluation reaches it",
    ),
    Case(
        "never-reached",
        "advice",
        lambda: Patient(LeftOut(training=False, evaluation=False), values(), layers=("branch",)),
        lambda: Patient(LeftOut(training=True, evaluation=False), values()),
        "nothing reaches it",
    ),
    Case(
        "never-reached",
        "advice",
        lambda: Patient(RarelyRuns(), values(), layers=("branch",)),
        lambda: Patient(DropsManyLayers(), values()),
        "of those left out at random",
    ),
    Case(
        "reached-twice",
        "advice",
        lambda: Patient(seeded(SharedNorm), images(), layers=("first.norm",)),
        lambda: changed(lambda net: None, batch=images(), more=[images(seed=1)]),
    ),
    Case("unlike-inputs", "fault", lambda: of_parts(4.0), lambda: of_parts(0.0), "in one batch"),
    Case(
        "unlike-inputs",
        "fault",
        lambda: Patient(nn.Sequential(nn.BatchNorm1d(4)), values(), [values(shift=4.0)], ("0",)),
        lambda: Patient(nn.Sequential(nn.BatchNorm1d(4)), values(), [values(seed=2), values(seed=3)]),
        "from batch to batch",
    ),
    Case(
        "unlike-inputs",
        "advice",
        lambda: Patient(
            nn.Sequential(nn.BatchNorm1d(32)), values(features=32), [values(features=32, seed=1, shift=0.5)], ("0",)
        ),
        lambda: Patient(nn.Sequential(nn.BatchNorm1d(32)), values(features=32), [values(features=32, seed=1)]),
        "half a standard deviation",
    ),
    Case(
        "bias-before-batch-norm",
        "advice",
        lambda: Patient(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), images(), layers=("1",)),
        lambda: Patient(BiasRead(), images()),
    ),
    *(
        Case(
            "bias-before-batch-norm",
            "advice",
            lambda: Patient(BiasKept(where="nowhere"), images(), layers=("bn",)),
            lambda where=where: Patient(BiasKept(where=where), images()),  # type: ignore[misc]
            where,
        )
        for where in ("output", "attribute")
    ),
    Case(
        "not-torchs",
        "advice",
        lambda: Patient(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)), layers=("0",)),
        lambda: Patient(nn.Sequential(FrozenBatchNorm2d(3), FrozenOfALibrary(3))),
    ),
]
