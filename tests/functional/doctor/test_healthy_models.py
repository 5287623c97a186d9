"""Architectures that people use have no fault, and no advice that is not true."""

import pytest
import torch

from lightning_bn.functional import diagnose
from tests.functional.recalibration.test_architectures import networks
from tests.models import EveryDimension, SmallResNet, images, seeded


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "efficientnet_b0", "mobilenet_v3"])
def test_nothing_is_found_in_a_healthy_architecture(name: str) -> None:
    torch.manual_seed(0)
    net = getattr(networks(), name)()
    assert diagnose(net, torch.randn(8, 3, 64, 64)) == []


@pytest.mark.parametrize("mode", [True, False])
def test_the_networks_of_the_tests_get_advice_on_their_biases_alone(mode: bool) -> None:
    for net, batch in ((SmallResNet, images()), (EveryDimension, torch.randn(8, 2, 4, 4, 4))):
        [finding] = diagnose(seeded(net).train(mode), batch)
        assert (finding.rule, finding.severity) == ("bias-before-batch-norm", "advice")
        assert all(f"{bias}" in finding.what for bias in ["head.fc"] if net is SmallResNet)
