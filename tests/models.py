"""Small real models, shared by the tests; nothing here knows `lightning_bn`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class Block(nn.Module):
    """Two 3x3 convolutions, each with its BatchNorm, around a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Head(nn.Module):
    """A linear layer, a BatchNorm1d and the classifier."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)
        self.bn = nn.BatchNorm1d(channels)
        self.out = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.bn(self.fc(x))))


class SmallResNet(nn.Module):
    """Ten BatchNorm layers, with `layer1` and `layer10` side by side; input (N, 3, H, W), output (N, 2)."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1 = nn.Sequential(Block(channels), Block(channels))
        self.layer2 = nn.Sequential(Block(channels))
        self.layer10 = nn.Sequential(Block(channels))
        self.head = Head(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(self.layer10(self.layer2(self.layer1(x))).mean((2, 3)))


#: The BatchNorm layers of SmallResNet in the order of their registration.
SMALL_RESNET_NAMES = [
    "bn1",
    "layer1.0.bn1",
    "layer1.0.bn2",
    "layer1.1.bn1",
    "layer1.1.bn2",
    "layer2.0.bn1",
    "layer2.0.bn2",
    "layer10.0.bn1",
    "layer10.0.bn2",
    "head.bn",
]


class Holder(nn.Module):
    """Keeps a network in `self.model`, as a LightningModule usually does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class BodyAndHead(nn.Module):
    """Two BatchNorm layers in the body, one in the head; input (N, 3), output (N, 2)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(3, width),
            nn.BatchNorm1d(width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.Tanh(),
        )
        self.head = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class EveryDimension(nn.Module):
    """A BatchNorm layer of each dimension; input (N, 2, 4, 4, 4), output (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.bn3 = nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)
        self.linear, self.bn1 = nn.Linear(4, 5), nn.BatchNorm1d(5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn3(self.conv3(x))).mean(2)
        x = torch.tanh(self.bn2(self.conv2(x))).mean((2, 3))
        return self.out(torch.tanh(self.bn1(self.linear(x))))


class SharedNorm(nn.Module):
    """One BatchNorm under two names, `first.norm` and `second.norm`, and another one, `own`."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(channels)
        self.first = nn.ModuleDict({"conv": nn.Conv2d(channels, channels, 1), "norm": norm})
        self.second = nn.ModuleDict({"conv": nn.Conv2d(channels, channels, 1), "norm": norm})
        self.own = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = block["norm"](block["conv"](x))
        return self.own(x)


class BatchNormAct2d(nn.BatchNorm2d):
    """BatchNorm with the activation inside, its forward spelled out as in timm's layer of that name."""

    def __init__(self, num_features: int, act: Callable[[], nn.Module] = nn.ReLU, **kwargs: object) -> None:
        super().__init__(num_features, **kwargs)  # type: ignore[arg-type]
        self.drop = nn.Identity()
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        reads_running = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if reads_running else None,
            self.running_var if reads_running else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            factor,
            self.eps,
        )
        return self.act(self.drop(x))


class FrozenBatchNorm2d(nn.Module):
    """What torchvision, detectron2 and timm call frozen: four buffers and no `_BatchNorm` base."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Broken(RuntimeError):
    """What a test breaks with."""


def images(batch: int = 8, *, seed: int = 0, size: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch of (batch, 3, size, size) values that are not standardized: mean 1.5, standard deviation 2."""
    generator = torch.Generator().manual_seed(seed)
    return 1.5 + 2 * torch.randn(batch, 3, size, size, generator=generator, dtype=dtype)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The model with the same weights each time; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def warmed(model: nn.Module, *, steps: int = 3) -> nn.Module:
    """The model in train mode after a few forwards, so that no running statistic is 0 or 1 any more."""
    dtype = next(model.parameters()).dtype
    model.train()
    with torch.no_grad():
        for step in range(steps):
            model(images(seed=100 + step, dtype=dtype))
    return model


def fill_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random running statistics (variances within 0.5 and 2) and affine parameters, no forward run."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, _BatchNorm):
                continue
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(0.5 + 1.5 * torch.rand(module.num_features, generator=generator))
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.fill_(7)
            if module.affine:
                module.weight.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return model


def bits(tensor: Tensor) -> bytes:
    """The bytes of a tensor, for comparisons in which NaN equals itself and 0.0 is not -0.0."""
    return bytes(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).tolist())


def state_bits(module: nn.Module) -> dict[str, bytes]:
    """The bytes of everything in a state dict."""
    return {name: bits(value) for name, value in module.state_dict().items()}


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Splits of a batch normalized each by itself, with statistics of their own in one buffer."""

    def __init__(self, channels: int, splits: int) -> None:
        super().__init__(channels)
        self.splits = splits
        self.register_buffer("running_mean", torch.zeros(channels * splits))
        self.register_buffer("running_var", torch.ones(channels * splits))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            mean, var = (stat[: self.num_features] for stat in (self.running_mean, self.running_var))  # type: ignore
            return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        weight, bias = self.weight.repeat(self.splits), self.bias.repeat(self.splits)
        folded = x.view(-1, self.num_features * self.splits, *x.shape[2:])
        mean, var, momentum = self.running_mean, self.running_var, self.momentum
        return nn.functional.batch_norm(folded, mean, var, weight, bias, True, momentum, self.eps).view(x.shape)  # type: ignore


class SplitBatchNorm2d(nn.BatchNorm2d):
    """The first half of a batch is normalized here, the others in a layer of their own, as for adversarial examples."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.aux = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        clean, other = x.chunk(2)
        return torch.cat((super().forward(clean), self.aux(other)))


class ChunkedBatchNorm2d(nn.BatchNorm2d):
    """A batch in chunks through one set of statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(ChunkedBatchNorm2d, self).forward(part) for part in x.chunk(2)])


class BatchRenorm2d(nn.BatchNorm2d):
    """Written by hand, without torch's function: reads its running statistics while it trains (arXiv 1702.03275)."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=1)
        shift = ((mean - self.running_mean) / (self.running_var + self.eps).sqrt()).clamp(-3, 3)  # type: ignore
        scale = ((var + self.eps) / (self.running_var + self.eps)).sqrt().clamp(1 / 3, 3)  # type: ignore
        self.corrections = torch.stack((scale, shift))
        self.running_mean += self.momentum * (mean - self.running_mean)  # type: ignore
        self.running_var += self.momentum * (var - self.running_var)  # type: ignore
        normalized = (x - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()
        return normalized * scale[:, None, None] + shift[:, None, None]


class HalfByHand(nn.BatchNorm2d):
    """Written by hand, with statistics of the first half of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x[: len(x) // 2].detach(), (0, 2, 3))
        self.running_mean.lerp_(mean, self.momentum)  # type: ignore
        self.running_var.lerp_(var, self.momentum)  # type: ignore
        return (x - mean[:, None, None]) / (var[:, None, None] + self.eps).sqrt()
