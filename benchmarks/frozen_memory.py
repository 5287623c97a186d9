"""What a training step with frozen BatchNorm keeps for its backward, needs at its peak, and takes.

Against torch's layers in eval mode, and layers that are put in their place, with the arithmetic of torchvision's
and detectron2's FrozenBatchNorm2d and timm's FrozenBatchNormAct2d written out. All take turns in one process.
"""

import copy
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path

import torch
from _networks import densenet121, efficientnet_b0, mobilenet_v3, resnet50, seeded
from _results import Results
from _rounds import Clock, asked_device, compare
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bn.functional import batch_norm_layers, freeze_batch_norm

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": resnet50,
    "DenseNet-121": densenet121,
    "EfficientNet-B0": efficientnet_b0,
    "MobileNetV3": mobilenet_v3,
}
TRAINED = {"all weights": "the weights below the layers train", "the first only": "the first convolution trains"}
BASE, OURS, AGAIN = "torch, .eval()", "freeze_batch_norm", "torch, .eval(), again"
MIB = 2**20
BATCH, COUNTED, TIMED, ROUNDS = 8, 160, 96, 15


class Frozen(nn.Module):
    """Buffers in the place of a layer.

    Args:
        layer: Which.
    """

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.eps = layer.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(layer, name).detach().clone())


class OfTorchvision(Frozen):
    """Multiplies and adds, in views of the buffers."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, variance, mean = (
            one.reshape(1, -1, 1, 1) for one in (self.weight, self.bias, self.running_var, self.running_mean)
        )
        scale = weight * (variance + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)


class OfDetectron2(Frozen):
    """Multiplies and adds where a gradient is wanted, and else runs torch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + shift.reshape(1, -1, 1, 1).to(x.dtype)


class OfTimm(Frozen):
    """As torchvision's, with an activation inside: none here, where it follows."""

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(layer)
        self.drop, self.act = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        mean, variance = self.running_mean.view(1, -1, 1, 1), self.running_var.view(1, -1, 1, 1)
        scale = weight * (variance + self.eps).rsqrt()
        return self.act(self.drop(x * scale + (bias - mean * scale)))


def put_in_place(network: nn.Module, kind: type[Frozen]) -> None:
    """Layer surgery."""
    for name, layer in batch_norm_layers(network).items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, kind(layer))


def by_hand(network: nn.Module) -> None:
    """Eval mode, and parameters that require no gradient."""
    for layer in batch_norm_layers(network).values():
        layer.eval().requires_grad_(False)


RIVALS: dict[str, Callable[[nn.Module], object]] = {
    BASE: by_hand,
    OURS: freeze_batch_norm,
    "torchvision's arithmetic": lambda network: put_in_place(network, OfTorchvision),
    "detectron2's arithmetic": lambda network: put_in_place(network, OfDetectron2),
    "timm's arithmetic": lambda network: put_in_place(network, OfTimm),
}


def images(size: int, device: torch.device) -> Tensor:
    """The same batch every time."""
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def rivals(name: str, trained: str, device: torch.device, names: list[str]) -> dict[str, nn.Module]:
    """The same network, frozen by each."""

    def build() -> nn.Module:
        network = NETWORKS[name]().train()
        with torch.no_grad():
            network(torch.randn(BATCH, 3, 64, 64))
        return network

    network = seeded(build).to(device)
    found = {}
    for one in names:
        found[one] = copy.deepcopy(network)
        RIVALS[one](found[one])
        if trained == "the first only":
            found[one].requires_grad_(False)
            next(m for m in found[one].modules() if isinstance(m, nn.Conv2d)).requires_grad_(True)
    return found


def step(network: nn.Module, batch: Tensor) -> Tensor:
    """Forward and backward; what the network gives."""
    network.zero_grad(set_to_none=True)
    output: Tensor = network(batch)
    output.square().mean().backward()
    return output.detach()


def kept(network: nn.Module, batch: Tensor) -> int:
    """Bytes of the tensors that a step keeps for its backward, each storage once, without the network's own."""
    own = {one.untyped_storage().data_ptr() for one in (*network.parameters(), *network.buffers())}
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # or another storage may have the same address
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(network, batch)
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def resident_at_most() -> int:
    """Bytes of this process that were in memory at one time, since that was last set back."""
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def peak(name: str, trained: str, rival: str, kind: str) -> int:
    """Bytes that a step needs at its peak beyond what was there: of a process of its own, or of CUDA's allocator."""
    device = torch.device(kind)
    network, batch = rivals(name, trained, device, [rival])[rival], images(COUNTED, device)
    step(network, images(32, device))
    network.zero_grad(set_to_none=True)
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(network, batch)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the highest level so far, on Linux
    before = resident_at_most()
    step(network, batch)
    return resident_at_most() - before


def peaks(name: str, trained: str, kind: str) -> dict[str, int]:
    """Of each rival."""
    found = {}
    for rival in RIVALS:
        if kind == "cuda":
            found[rival] = peak(name, trained, rival, kind)
        else:
            with multiprocessing.get_context("spawn").Pool(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                found[rival] = pool.apply(peak, (name, trained, rival, kind))
    return found


def seconds(networks: dict[str, nn.Module], batch: Tensor, clock: Clock) -> dict[str, list[float]]:
    """Of each one's steps, which take turns; the first rounds warm up."""
    marks: dict[str, list[tuple[object, object]]] = {name: [] for name in networks}
    for turn in range(1 + clock.warm_up + ROUNDS):
        for name, network in networks.items():
            started = clock.now()
            step(network, batch)
            if turn > clock.warm_up:
                marks[name].append((started, clock.now()))
    return {name: clock.seconds(spent) for name, spent in marks.items()}


def main() -> None:
    """Prints the tables and writes them to `benchmarks/results/`."""
    device = asked_device()
    clock = Clock(device)
    question = "What a training step with frozen BatchNorm keeps for its backward, needs at its peak, and takes."
    results = Results("frozen_memory", question, device)
    memory, times = [], []
    for trained, words in TRAINED.items():
        for name in NETWORKS:
            networks = rivals(name, trained, device, list(RIVALS))
            batch = images(COUNTED, device)
            found = {rival: kept(network, batch) for rival, network in networks.items()}
            outputs = {rival: step(network, images(64, device)) for rival, network in networks.items()}
            highest = peaks(name, trained, device.type)
            for rival in RIVALS:
                memory.append(
                    {
                        "train": trained,
                        "network": name,
                        "layers": rival,
                        "kept, MiB": found[rival] / MIB,
                        "peak, MiB": highest[rival] / MIB,
                        "output": "bits of torch's"
                        if torch.equal(outputs[rival], outputs[BASE])
                        else f"{(outputs[rival] - outputs[BASE]).abs().max() / outputs[BASE].abs().max():.0e} off",
                    }
                )
            again = copy.deepcopy(networks[BASE])
            taken = seconds({**networks, AGAIN: again}, images(TIMED, device), clock)
            for rival, spent in taken.items():
                row = compare(spent, taken[BASE])
                times.append(
                    {
                        "train": trained,
                        "network": name,
                        "layers": rival,
                        "ms per step": 1000 * row.seconds,
                        "ratio": row.ratio,
                        "median": row.median,
                        "10 to 90 %": row.spread,
                    }
                )
            print(f"{name}, {words}: done", flush=True)
    what = "of CUDA's allocator" if device.type == "cuda" else "of a process of its own"
    results.table(
        f"Memory of a step, {BATCH} images of {COUNTED} x {COUNTED}",
        memory,
        "kept: tensors kept for the backward, each storage once, without parameters and buffers. peak: "
        f"{what}, beyond what was there before the step. train: all weights below the layers, or the first "
        "convolution only, as with an adapter in front of a fixed network. output: against torch's layer.",
    )
    results.table(
        f"Time of a step, {BATCH} images of {TIMED} x {TIMED}",
        times,
        f"Forward and backward, against `{BASE}`, {ROUNDS} turns of one step. ratio: of the fastest; median and "
        "percentiles: of neighboring turns. The rows `again` are the measurement's own error.",
    )
    results.write()


if __name__ == "__main__":
    main()
