"""A module that refers to its own layers in ways of its own is recalibrated like any other."""

import functools
from typing import Any

import pytest
import pytorch_lightning as pl
from torch import nn

from lightning_bn import PreciseBatchNorm
from tests.callbacks.fits import LAYERS, Classifier, quiet, train_loader, val_loader
from tests.oracle import assert_all_statistics, layer_inputs

NORMS = [name.removeprefix("net.") for name in LAYERS]


class Registry:
    """Somebody's book of layers."""

    def __init__(self, layer: nn.Module) -> None:
        self.layers = {"bn": layer}


def in_a_list(module: Any) -> None:
    module.norms = [module.net.bn]


def in_an_object(module: Any) -> None:
    module.registry = Registry(module.net.bn)


def as_a_method(module: Any) -> None:
    # As Lightning itself leaves it where a strategy wraps the module.
    module.forward = module.forward


def in_a_partial(module: Any) -> None:
    module.run = functools.partial(module.net)


def in_a_closure(module: Any) -> None:
    net = module.net
    module.run = lambda x: net(x) + 1


def its_buffers(module: Any) -> None:
    module.watched = [module.net.bn.running_mean, module.net.bn.running_var]


def its_state(module: Any) -> None:
    module.watched = module.net.state_dict()


@pytest.mark.parametrize(
    "refer", [in_a_list, in_an_object, as_a_method, in_a_partial, in_a_closure, its_buffers, its_state]
)
def test_statistics_stay_where_the_module_refers_to_its_own_layers(refer):
    module = Classifier()
    refer(module)
    callback = PreciseBatchNorm(num_batches=3)
    pl.seed_everything(3, verbose=False)
    quiet(callbacks=[callback], num_sanity_val_steps=0).fit(module, train_loader(), val_loader())
    assert len(module.validated) == 2
    for _, net, used in module.validated:
        assert_all_statistics(net, layer_inputs(net.train(), used, NORMS))
