"""The networks that are measured: the architectures' layer lists, without anyone's pre-trained weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A network with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def resnet50() -> nn.Module:
    """53 BatchNorm layers, 26,560 channels (He et al. 2016, the variant with the stride in the 3x3 convolution)."""
    stages, inputs = [_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(depth):
            stages.append(_Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 100))


def densenet121() -> nn.Module:
    """121 BatchNorm layers, 41,824 channels (Huang et al. 2017)."""
    growth, channels = 32, 64
    layers = [_conv(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for index, depth in enumerate((6, 12, 24, 16)):
        if index:
            layers += [_before(channels, channels // 2, 1), nn.AvgPool2d(2, ceil_mode=True)]
            channels //= 2
        for _ in range(depth):
            layers.append(_Dense(channels, growth))
            channels += growth
    head = (nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 100))
    return nn.Sequential(*layers, *head)


def efficientnet_b0() -> nn.Module:
    """49 BatchNorm layers, 21,008 channels (Tan & Le 2019), with its squeeze-and-excitation and SiLU."""
    layers, inputs = [_conv(3, 32, 3, 2, activation=nn.SiLU)], 32
    for expand, width, depth, stride, kernel in (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ):
        for block in range(depth):
            layers.append(_MBConv(inputs, width, expand, kernel, stride if block == 0 else 1))
            inputs = width
    head = (_conv(inputs, 1280, 1, activation=nn.SiLU), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 100))
    return nn.Sequential(*layers, *head)


def mobilenet_v3() -> nn.Module:
    """46 BatchNorm layers, 12,200 channels (Howard et al. 2019, table 1: large)."""
    layers, inputs = [_conv(3, 16, 3, 2, activation=nn.Hardswish)], 16
    for kernel, width, outputs, squeezes, activation, stride in (
        (3, 16, 16, False, nn.ReLU, 1),
        (3, 64, 24, False, nn.ReLU, 2),
        (3, 72, 24, False, nn.ReLU, 1),
        (5, 72, 40, True, nn.ReLU, 2),
        (5, 120, 40, True, nn.ReLU, 1),
        (5, 120, 40, True, nn.ReLU, 1),
        (3, 240, 80, False, nn.Hardswish, 2),
        (3, 200, 80, False, nn.Hardswish, 1),
        (3, 184, 80, False, nn.Hardswish, 1),
        (3, 184, 80, False, nn.Hardswish, 1),
        (3, 480, 112, True, nn.Hardswish, 1),
        (3, 672, 112, True, nn.Hardswish, 1),
        (5, 672, 160, True, nn.Hardswish, 2),
        (5, 960, 160, True, nn.Hardswish, 1),
        (5, 960, 160, True, nn.Hardswish, 1),
    ):
        gate = [_SqueezeExcitation(width, width // 4, nn.ReLU, nn.Hardsigmoid)] if squeezes else []
        branch = nn.Sequential(
            *([] if width == inputs else [_conv(inputs, width, 1, activation=activation)]),
            _conv(width, width, kernel, stride, groups=width, activation=activation),
            *gate,
            _conv(width, outputs, 1, activation=None),
        )
        layers.append(_Residual(branch) if stride == 1 and inputs == outputs else branch)
        inputs = outputs
    head = (_conv(inputs, 960, 1, activation=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, *head, nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 100))


def mlp500(width: int = 32) -> nn.Module:
    """500 narrow layers, each with a BatchNorm: next to no arithmetic, so that it shows what each layer costs."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()) for _ in range(500))
    )


def _conv(
    inputs: int,
    outputs: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    activation: Callable[[], nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), *([] if activation is None else [activation()]))


def _before(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Normalized before it is convolved."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), convolution)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.branch = nn.Sequential(
            _conv(inputs, width, 1), _conv(width, width, 3, stride), _conv(width, outputs, 1, activation=None)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


class _Dense(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_before(inputs, 4 * growth, 1), _before(4 * growth, growth, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.branch(x)), 1)


class _SqueezeExcitation(nn.Module):
    def __init__(
        self,
        channels: int,
        squeezed: int,
        activation: Callable[[], nn.Module] = nn.SiLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            activation(),
            nn.Conv2d(squeezed, channels, 1),
            gate(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class _Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class _MBConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = expand * inputs
        self.branch = nn.Sequential(
            *([] if expand == 1 else [_conv(inputs, width, 1, activation=nn.SiLU)]),
            _conv(width, width, kernel, stride, groups=width, activation=nn.SiLU),
            _SqueezeExcitation(width, max(1, inputs // 4)),
            _conv(width, outputs, 1, activation=None),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.residual else self.branch(x)
