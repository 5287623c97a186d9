"""The layout of channels: every reduction is that of the layers one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_bn.functional.statistics.channels import ChannelLayout

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=7)


def layout_of(sizes: list[int]) -> ChannelLayout:
    return ChannelLayout(tuple(f"layer{index}" for index in range(len(sizes))), tuple(sizes))


def values(count: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


@given(sizes=SIZES)
def test_reductions_are_those_of_each_layer(sizes: list[int]) -> None:
    layout = layout_of(sizes)
    flat = values(sum(sizes))
    parts = flat.split(sizes)
    torch.testing.assert_close(layout.sum(flat), torch.stack([part.sum() for part in parts]))
    torch.testing.assert_close(layout.mean(flat), torch.stack([part.mean() for part in parts]))
    torch.testing.assert_close(layout.max(flat), torch.stack([part.max() for part in parts]))
    torch.testing.assert_close(layout.sum(values(sum(sizes), 3)).shape, torch.Size((3, len(sizes))))


@given(sizes=SIZES)
def test_split_slices_and_positions_agree(sizes: list[int]) -> None:
    layout = layout_of(sizes)
    flat = values(layout.channels)
    assert list(layout.split(flat)) == list(layout.slices) == list(layout.names)
    for name, part in layout.split(flat).items():
        assert torch.equal(part, flat[layout.slices[name]])
        assert layout.locate(layout.slices[name].stop - 1) == (name, len(part) - 1)


@given(sizes=SIZES)
def test_what_is_expanded_is_constant_within_a_layer(sizes: list[int]) -> None:
    layout = layout_of(sizes)
    per_layer = torch.arange(len(sizes), dtype=torch.float64)
    expected = torch.cat([torch.full((size,), float(index)).double() for index, size in enumerate(sizes)])
    assert torch.equal(layout.expand(per_layer), expected)
    assert torch.equal(layout.constant(tuple(per_layer.tolist()), torch.device("cpu")), expected)


def test_restricted_to_names_it_takes_their_order() -> None:
    layout = layout_of([1, 2, 3])
    flat = torch.arange(6.0)
    assert layout.restrict(["layer2", "layer0"]) == ChannelLayout(("layer2", "layer0"), (3, 1))
    assert layout.pick(flat, ["layer2", "layer0"]).tolist() == [3.0, 4.0, 5.0, 0.0]


def test_joined_is_one_behind_another() -> None:
    joined = ChannelLayout.joined([ChannelLayout(("a",), (2,)), ChannelLayout(("b", "c"), (1, 4))])
    assert joined == ChannelLayout(("a", "b", "c"), (2, 1, 4))


def test_of_layers_it_has_their_features() -> None:
    layers = {"a": nn.BatchNorm1d(3), "b": nn.BatchNorm2d(5)}
    assert ChannelLayout.of(layers) == ChannelLayout(("a", "b"), (3, 5))
    assert len(ChannelLayout.of(layers)) == 2


def test_a_nan_is_the_largest_of_its_layer_alone() -> None:
    found = layout_of([2, 2]).max(torch.tensor([1.0, torch.nan, 3.0, 2.0]))
    assert found[0].isnan()
    assert float(found[1]) == 3.0


def test_a_position_behind_the_last_channel_is_an_error() -> None:
    with pytest.raises(IndexError, match="position 6"):
        layout_of([1, 2, 3]).locate(6)


def test_a_layout_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        layout_of([1]).names = ("other",)  # type: ignore[misc]
