"""What else recomputes running statistics, measured where it installs; docs/alternatives.md has to say exactly that."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lightning_bn.functional import recalibrate
from tests.models import Broken, bits, state_bits

PAGE = Path(__file__).parent.parent / "docs" / "alternatives.md"

Tool = Callable[[nn.Module, Sequence[Tensor]], Any]
TOOLS: dict[str, Tool] = {
    "`recalibrate`": recalibrate,
    "torch `update_bn`": lambda model, batches: update_bn(batches, model),
    "fvcore `update_bn_stats`": lambda model, batches: update_bn_stats(model, batches, len(batches)),
}


class Probe(nn.Module):
    """A layer in train mode, one in eval mode, one that no forward reaches; dropout and an InstanceNorm that tracks.

    Args:
        twice: Run the first layer a second time, with inputs shifted by 4.
        breaks: Raise an error for a batch of nine.
    """

    def __init__(self, twice: bool = False, breaks: bool = False) -> None:
        super().__init__()
        self.norm, self.frozen, self.unreached = nn.BatchNorm1d(1), nn.BatchNorm1d(1), nn.BatchNorm1d(1)
        self.dropout, self.other = nn.Dropout(0.5), nn.InstanceNorm1d(1, track_running_stats=True)
        self.twice, self.breaks = twice, breaks
        for layer in (self.norm, self.frozen, self.unreached):
            layer.running_mean.fill_(5)
            layer.running_var.fill_(7)
            layer.num_batches_tracked.fill_(50)
        self.train()
        self.frozen.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks and len(x) == 9:
            raise Broken
        self.other(x.view(1, 1, -1))
        self.frozen(x)
        self.norm(x)
        if self.twice:
            self.norm(x + 4)
        return self.dropout(x)


def values(count: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """(count, 1), with exactly this mean and this biased standard deviation."""
    x = torch.randn(count, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    return ((x - x.mean()) / x.std(correction=0) * std + mean).float()


def after(tool: Tool, *batches: Tensor, **options: bool) -> Probe:
    model = Probe(**options)
    tool(model, batches)
    return model


def named(found: float, meanings: dict[str, float]) -> str:
    """The meaning whose number was found.

    Raises:
        AssertionError: If none was.
    """
    close = [meaning for meaning, number in meanings.items() if abs(found - number) <= 0.01 * max(abs(number), 0.1)]
    assert len(close) == 1, f"{found} is none of {meanings}"
    return close[0]


def variance(tool: Tool) -> str:
    apart = after(tool, values(1000, -3), values(1000, 3)).norm.running_var.item()
    return named(apart, {"pooled": 10, "mean of batches": 1})


def stored(tool: Tool) -> str:
    return named(after(tool, values(8)).norm.running_var.item(), {"unbiased": 8 / 7, "biased": 1})


def unequal(tool: Tool) -> str:
    return named(after(tool, values(24), values(8, 4)).norm.running_mean.item(), {"by size": 1, "equally": 2})


def large_mean(tool: Tool) -> str:
    found = after(tool, *(values(1000, 10_000) for _ in range(4))).norm.running_var.item()
    return "right" if abs(found - 1) < 0.01 else "wrong"


def dropout(tool: Tool) -> str:
    model, seen = Probe(), list[bool]()
    model.dropout.register_forward_hook(lambda layer, *_: seen.append(layer.training))
    tool(model, [values(8), values(8)])
    return "as in training" if all(seen) else "off"


def eval_layers(tool: Tool) -> str:
    frozen = after(tool, values(8)).frozen
    return "as they were" if frozen.running_mean.item() == 5 and not frozen.training else "rewritten"


def others(tool: Tool) -> str:
    other = after(tool, values(8, 3)).other
    return "as they were" if other.running_mean.item() == 0 else "moved"


def unreached(tool: Tool) -> str:
    layer = after(tool, values(8)).unreached
    found = (layer.running_mean.item(), layer.running_var.item())
    return {(5, 7): "as it was", (0, 1): "mean 0, variance 1", (0, 0): "mean 0, variance 0"}[found]


def used_twice(tool: Tool) -> str:
    try:
        model = after(tool, values(8), twice=True)
    except AssertionError:
        return "an error"
    return named(model.norm.running_mean.item(), {"both": 2, "the last": 4})


def counter(tool: Tool) -> str:
    found = after(tool, values(8), values(8)).norm.num_batches_tracked.item()
    return {50: "as it was", 52: "counts the pass", 2: "starts again"}[int(found)]


def written(tool: Tool) -> str:
    model = Probe()
    buffer = model.norm.running_mean
    tool(model, [values(8)])
    return "in place" if model.norm.running_mean is buffer else "new tensors"


def random_numbers(tool: Tool) -> str:
    before = torch.get_rng_state()
    after(tool, values(8))
    return "as they were" if bits(torch.get_rng_state()) == bits(before) else "used up"


def failure(tool: Tool) -> str:
    model = Probe(breaks=True)
    state, modes = state_bits(model), [module.training for module in model.modules()]
    with pytest.raises(Broken):
        tool(model, [values(8), values(9)])
    kept = {
        "statistics": state_bits(model) == state,
        "momentum": model.norm.momentum == 0.1,
        "modes": [module.training for module in model.modules()] == modes,
        "hooks": not model.norm._forward_pre_hooks,
    }
    return "all as it was" if all(kept.values()) else f"not: {', '.join(name for name in kept if not kept[name])}"


FACTS: dict[str, Callable[[Tool], str]] = {
    "variance of several batches": variance,
    "variance that is stored": stored,
    "batches of unequal size count": unequal,
    "float32 inputs of mean 10,000": large_mean,
    "dropout modules in the pass": dropout,
    "layers in eval mode": eval_layers,
    "other layers with state": others,
    "a layer that no batch reaches": unreached,
    "a layer used twice by one forward": used_twice,
    "`num_batches_tracked`": counter,
    "buffers are written": written,
    "random numbers of training": random_numbers,
    "after an error in the forward": failure,
}


def table(text: str) -> dict[str, dict[str, str]]:
    """The table of the page whose first column has the facts: for each of the tools what it says, by fact."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    heads = next(line for line in lines if set(TOOLS) <= set(line))
    found = {line[0]: dict(zip(heads, line, strict=True)) for line in lines if line[0] in FACTS}
    return {fact: {tool: cells[tool] for tool in TOOLS} for fact, cells in found.items()}


DOCUMENTED = table(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}


def test_the_page_lists_all_facts() -> None:
    assert list(DOCUMENTED) == list(FACTS)


@pytest.mark.parametrize("fact", FACTS)
def test_the_page_says_what_was_measured(fact: str) -> None:
    assert DOCUMENTED[fact] == {name: FACTS[fact](tool) for name, tool in TOOLS.items()}


def main() -> None:
    """Print the part of the table that is measured."""
    for fact, measured in FACTS.items():
        print(f"| {fact} | {' | '.join(measured(tool) for tool in TOOLS.values())} |")


if __name__ == "__main__":
    main()
