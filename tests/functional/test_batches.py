"""Batches of every make are moved, counted and fed."""

import collections
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_bn.functional._batches import default_forward, model_device, num_samples, to_device


class TwoInputs(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


class Keywords(nn.Module):
    def forward(self, *, image: Tensor) -> Tensor:
        return image


@pytest.mark.parametrize("model", [TwoInputs(), Keywords(), nn.Bilinear(2, 2, 1)])
@pytest.mark.parametrize("batch", [torch.ones(2), (torch.ones(2), torch.ones(2))])
def test_model_of_other_inputs_than_one_tensor_is_told_of_forward(model, batch):
    with pytest.raises(TypeError, match=rf"{type(model).__name__}.*one tensor.*pass forward="):
        default_forward(model, batch)


def test_error_of_the_models_own_is_not_changed():
    with pytest.raises(RuntimeError, match="shape"):
        default_forward(nn.Linear(3, 1), torch.ones(2, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_model_has_no_signature_and_is_called():
    scripted = torch.jit.trace(nn.Linear(2, 1), torch.ones(1, 2))
    assert default_forward(scripted, torch.ones(4, 2)).shape == (4, 1)


META = torch.device("meta")  # the second device that every machine has


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


class Encoding(UserDict):
    """A tokenizer's result: a mapping that knows how to move itself."""


class Stack(list):
    """Somebody's list."""


@pytest.mark.parametrize(
    "batch",
    [
        [torch.ones(2), "a", 3],
        (torch.ones(2), None),
        {"x": torch.ones(2), "y": [torch.ones(1)]},
        Pair(torch.ones(2), torch.ones(2)),
        OrderedDict(x=torch.ones(2)),
        defaultdict(list, x=torch.ones(2)),
        Encoding(x=torch.ones(2)),
        Stack([torch.ones(2)]),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_every_tensor_is_moved_and_the_batch_keeps_its_make(batch):
    moved = to_device(batch, META)
    assert isinstance(moved, dict if isinstance(batch, defaultdict) else type(batch))
    assert len(moved) == len(batch)
    values = moved.values() if hasattr(moved, "values") else moved
    assert all(value.device == META for value in values if isinstance(value, Tensor))
    assert any(isinstance(value, Tensor) for value in values)
    nested = moved["y"][0] if "y" in moved else None
    assert nested is None or nested.device == META


def test_what_knows_how_to_move_itself_is_asked_to():
    packed = to_device(pack_sequence([torch.ones(3), torch.ones(2)]), torch.device("cpu"))
    assert isinstance(packed, PackedSequence)
    assert to_device("text", META) == "text"
    assert to_device(None, META) is None


def test_batch_that_is_already_there_is_not_copied():
    x = torch.ones(2)
    assert to_device([x], torch.device("cpu"))[0] is x


def test_dataclass_is_handed_on_as_it_is():
    @dataclass
    class Sample:
        x: Tensor

    sample = Sample(torch.ones(2))
    assert to_device(sample, torch.device("cpu")) is sample


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.ones(7, 2), 7),
        (torch.tensor(1.0), None),
        ([torch.ones(3, 1), torch.ones(9)], 3),
        (("path", {"x": torch.ones(4)}), 4),
        ({"loss weight": torch.tensor(1.0), "x": torch.ones(5)}, 5),
        (Encoding(x=torch.ones(6)), 6),
        ([[["a"]], torch.ones(2)], 2),
        (torch.zeros(0, 3), 0),
        ([], None),
        ("text", None),
        (None, None),
    ],
)
def test_samples_are_the_leading_dimension_of_the_first_tensor(batch, count):
    assert num_samples(batch) == count


def test_device_is_that_of_the_first_parameter_or_buffer_and_else_the_cpu():
    assert model_device(nn.Linear(1, 1, device=META)) == META
    assert model_device(nn.BatchNorm1d(1, affine=False, device=META)) == META
    assert model_device(nn.ReLU()) == torch.device("cpu")


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale


def test_a_tensor_a_sequence_or_keywords_are_fed():
    x = torch.ones(2)
    for batch in (x, [x, x + 1], (x,), Pair(x, x + 1), {"x": x}, {"scale": 1.0, "x": x}, Encoding(x=x)):
        assert torch.equal(default_forward(Scaled(), batch), x)


def test_keywords_are_checked_against_the_forward_of_a_compiled_model_too():
    compiled = torch.compile(Scaled(), backend="eager")
    with pytest.raises(TypeError, match=r"Scaled|Optimized") as caught:
        default_forward(compiled, {"image": torch.ones(2)})
    assert "image" in str(caught.value)
    torch._dynamo.reset()


def test_forward_that_takes_any_keyword_is_fed_them_all():
    class Any(nn.Module):
        def forward(self, **batch: Tensor) -> list[str]:
            return sorted(batch)

    assert default_forward(Any(), {"b": torch.ones(1), "a": torch.ones(1)}) == ["a", "b"]


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ("text", "str"),
        (["text"], "list that starts with str"),
        ([], "list"),
        (collections.deque(), "deque"),
        (3, "int"),
        (None, "NoneType"),
    ],
)
def test_what_cannot_be_fed_is_named(batch, named):
    with pytest.raises(TypeError, match=rf"{named}.*forward="):
        default_forward(Scaled(), batch)
