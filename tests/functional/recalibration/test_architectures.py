"""Architectures people use, as the benchmarks build them: statistics equal those of the same batches in float64."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_bn.functional import recalibrate
from tests.oracle import assert_all_statistics, layer_inputs

NETWORKS = Path(__file__).parents[3] / "benchmarks" / "_networks.py"


def networks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_networks", NETWORKS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "layers"), [("resnet50", 53), ("densenet121", 121), ("efficientnet_b0", 49), ("mobilenet_v3", 46)]
)
def test_statistics_of_a_real_architecture_equal_those_in_float64(name: str, layers: int) -> None:
    torch.manual_seed(0)
    net = getattr(networks(), name)().train()
    batches = [torch.randn(size, 3, 64, 64) for size in (5, 3)]
    inputs = layer_inputs(net, batches)
    done = recalibrate(net, batches)
    assert len(done.layers) == len(inputs) >= layers - 5
    assert_all_statistics(net, inputs)
