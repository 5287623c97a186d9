"""Count, mean and M2 of samples, merged, against float64 statistics of the concatenated data."""

import math
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_bn.functional.statistics.sample_moments import Moments, merge, moments, variance

#: Relative to the spread of the data. E[x^2] - E[x]^2 misses it by three orders at mean/std 1e4, even in float64.
TOLERANCE = 1e-11


def by_definition(data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 per channel of (n, C), by exactly rounded sums of the float64 values."""
    mean, m2 = [], []
    for channel in data.double().T.tolist():
        center = math.fsum(channel) / len(channel)
        mean.append(center)
        m2.append(math.fsum((value - center) ** 2 for value in channel))
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(m2, dtype=torch.float64)


@st.composite
def samples(draw: st.DrawFn, max_parts: int = 8) -> tuple[list[Tensor], float]:
    """Parts of 0 to 257 values with at least one value among them, mean/std up to 1e4, parts that may be shifted."""
    channels = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 3, 16, 257]) | st.integers(0, 257), min_size=1, max_size=max_parts))
    if not sum(sizes):
        sizes.append(draw(st.integers(1, 257)))
    scale = draw(st.sampled_from([1e-6, 1e-2, 1.0, 1e3]))
    ratio = draw(st.sampled_from([0.0, 1.0, -30.0, 1e2, -1e3, 1e4]))
    apart = draw(st.sampled_from([0.0, 3.0]))  # the parts' means lie this many standard deviations apart
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    parts = []
    for index, size in enumerate(sizes):
        values = torch.randn(size, channels, generator=generator, dtype=torch.float64)
        parts.append((scale * (values + ratio + apart * index)).to(dtype))
    return parts, scale


def assert_matches(result: Moments, data: Tensor, scale: float) -> None:
    n = len(data)
    mean, m2 = by_definition(data)
    assert result.mean.dtype == result.m2.dtype == result.count.dtype == torch.float64
    assert torch.equal(result.count.expand_as(mean), torch.full_like(mean, n))
    spread = scale * (1 + (mean / scale).abs() * 1e-5)  # float32 input and parts far apart widen it
    assert ((result.mean - mean).abs() <= TOLERANCE * spread + 1e-15 * mean.abs()).all()
    biased = m2 / n
    error = (variance(result, unbiased=False) - biased).abs()
    assert (error <= TOLERANCE * (biased + scale**2)).all()
    if n > 1:
        unbiased = m2 / (n - 1)
        error = (variance(result, unbiased=True) - unbiased).abs()
        assert (error <= TOLERANCE * (unbiased + scale**2)).all()
        assert torch.equal(variance(result), variance(result, unbiased=True))
    else:
        assert variance(result).isnan().all()


@settings(max_examples=150, deadline=None)
@given(samples())
def test_merged_parts_have_the_moments_of_the_concatenated_data(drawn: tuple[list[Tensor], float]) -> None:
    parts, scale = drawn
    assert_matches(reduce(merge, map(moments, parts)), torch.cat(parts), scale)


@settings(max_examples=75, deadline=None)
@given(samples(), st.randoms(use_true_random=False))
def test_the_order_of_the_parts_does_not_matter(drawn: tuple[list[Tensor], float], random: object) -> None:
    parts, scale = drawn
    shuffled = list(map(moments, parts))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert_matches(reduce(merge, shuffled), torch.cat(parts), scale)


@settings(max_examples=75, deadline=None)
@given(samples(max_parts=6))
def test_merging_in_a_tree_gives_the_same(drawn: tuple[list[Tensor], float]) -> None:
    parts, scale = drawn
    level = list(map(moments, parts))
    while len(level) > 1:
        level = [merge(*level[i : i + 2]) if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
    assert_matches(level[0], torch.cat(parts), scale)


@settings(max_examples=50, deadline=None)
@given(samples(max_parts=2))
def test_merge_is_symmetric(drawn: tuple[list[Tensor], float]) -> None:
    parts, scale = drawn
    a, b = moments(parts[0]), moments(torch.cat(parts))
    one, other = merge(a, b), merge(b, a)
    assert torch.equal(one.count.expand_as(one.mean), other.count.expand_as(other.mean))
    mean = one.mean.abs().max()
    assert ((one.mean - other.mean).abs() <= 1e-15 * mean + TOLERANCE * scale).all()
    assert ((one.m2 - other.m2).abs() <= TOLERANCE * (one.m2 + scale**2 * one.count)).all()


@settings(max_examples=50, deadline=None)
@given(samples(max_parts=3), st.integers(0, 3))
def test_an_empty_sample_changes_nothing(drawn: tuple[list[Tensor], float], empties: int) -> None:
    whole = moments(torch.cat(drawn[0]))
    empty = moments(torch.empty(0, whole.mean.numel()))
    merged = whole
    for _ in range(empties):
        merged = merge(merged, empty)
        assert torch.equal(merge(empty, whole).mean, whole.mean)
        assert torch.equal(merge(empty, whole).m2, whole.m2)
    assert torch.equal(merged.mean, whole.mean)
    assert torch.equal(merged.m2, whole.m2)
    assert torch.equal(merged.count.expand_as(whole.mean), whole.count.expand_as(whole.mean))


@settings(max_examples=50, deadline=None)
@given(samples(max_parts=1), st.integers(0, 3), st.integers(1, 3))
def test_positions_are_values_of_their_channel(drawn: tuple[list[Tensor], float], dims: int, size: int) -> None:
    (data, *_), scale = drawn
    n = len(data) // size**dims * size**dims
    if not n:
        return
    data = data[:n]
    channels = data.shape[1]
    x = data.reshape(-1, *[size] * dims, channels).movedim(-1, 1)
    assert x.shape[1] == channels
    assert_matches(moments(x), data, scale)


# --- single batches ----------------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(2).add(5).to(dtype)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 4, 5), (2, 3, 4, 5, 2), (1, 3, 7), (1, 1, 1)])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:]
)
def test_a_batch_gives_the_moments_of_its_values_in_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(*shape, dtype=dtype)
    result = moments(x)
    data = x.double().movedim(1, -1).reshape(-1, shape[1])
    assert result.mean.shape == result.m2.shape == (shape[1],)
    assert_matches(result, data, scale=2.0)


@pytest.mark.parametrize("channel_dim", [0, 1, 2, 3, -1, -3])
def test_the_channels_may_be_in_another_dimension(channel_dim: int) -> None:
    x = normal(6, 3, 4, 5).movedim(1, channel_dim)
    for got, expected in zip(moments(x, channel_dim), moments(normal(6, 3, 4, 5)), strict=True):
        assert torch.allclose(got, expected, rtol=1e-13)


def test_the_layout_in_memory_does_not_matter() -> None:
    x = normal(6, 3, 4, 5, dtype=torch.float32)
    x_last = x.to(memory_format=torch.channels_last)
    for got, expected in zip(moments(x_last), moments(x), strict=True):
        assert torch.allclose(got, expected, rtol=1e-13)


def test_a_large_mean_in_float32_does_not_cost_the_variance() -> None:
    x = (torch.randn(257, 2, generator=torch.Generator().manual_seed(1)) + 1e4).float()
    naive = (x**2).mean(0) - x.mean(0) ** 2
    _, m2 = by_definition(x)
    assert ((naive - m2 / 257).abs() > 0.01).any()  # what happens without care
    assert torch.allclose(variance(moments(x), unbiased=False), m2 / 257, rtol=1e-11)


def test_biased_and_unbiased_differ_by_the_count() -> None:
    of = moments(normal(5, 3))
    assert torch.allclose(variance(of, unbiased=True) * 4, variance(of, unbiased=False) * 5, rtol=1e-14)


def test_a_constant_has_variance_zero_exactly() -> None:
    x = torch.full((5, 2), 1e4 / 3)
    whole = merge(moments(x), moments(x[:3]))
    assert variance(whole, unbiased=True).tolist() == [0.0, 0.0]
    assert variance(whole, unbiased=False).tolist() == [0.0, 0.0]


def test_one_value_has_a_biased_but_no_unbiased_variance() -> None:
    of = moments(normal(1, 3))
    assert variance(of, unbiased=True).isnan().all()
    assert variance(of, unbiased=False).tolist() == [0.0] * 3


def test_no_value_has_no_variance() -> None:
    empty = moments(torch.empty(0, 3, 4))
    assert torch.equal(empty.count.expand(3), torch.zeros(3, dtype=torch.float64))
    for of in (empty, merge(empty, empty)):
        assert variance(of, unbiased=True).isnan().all()
        assert variance(of, unbiased=False).isnan().all()


def test_a_batch_without_positions_is_empty() -> None:
    of = merge(moments(torch.empty(4, 3, 0)), moments(normal(5, 3)))
    assert torch.equal(of.mean, moments(normal(5, 3)).mean)


@pytest.mark.parametrize("rest", [1e17, -3.0])
def test_an_empty_sample_may_carry_any_finite_numbers(rest: float) -> None:
    whole = moments(normal(5, 3))
    empty = Moments(torch.zeros((), dtype=torch.float64), torch.full_like(whole.mean, rest), torch.zeros_like(whole.m2))
    for merged in (merge(whole, empty), merge(empty, whole)):
        assert torch.equal(merged.mean, whole.mean)
        assert torch.equal(merged.m2, whole.m2)


def test_one_value_at_a_time_gives_the_whole() -> None:
    x = normal(257, 2)
    assert_matches(reduce(merge, [moments(row[None]) for row in x]), x, scale=2.0)


def test_channels_may_have_counts_of_their_own() -> None:
    x, y = normal(257, 3), normal(9, 3) * 3
    counts = [4, 0, 257]
    parts = [moments(x[: max(n, 1), i : i + 1]) if n else moments(x[:0, i : i + 1]) for i, n in enumerate(counts)]
    joined = Moments(*[torch.cat([getattr(p, f).expand(1) for p in parts]) for f in ("count", "mean", "m2")])
    merged = merge(joined, moments(y))
    for channel, n in enumerate(counts):
        data = torch.cat([x[:n, channel : channel + 1], y[:, channel : channel + 1]])
        assert_matches(Moments(*[f.expand(3)[channel : channel + 1] for f in merged]), data, scale=4.0)
    undefined = variance(joined, unbiased=True).isnan()
    assert undefined.tolist() == [False, True, False]


def test_merging_leaves_its_arguments_as_they_were() -> None:
    a, b = moments(normal(5, 3)), moments(normal(9, 3) + 1)
    held = [[field.clone() for field in of] for of in (a, b)]
    merge(a, b)
    for of, copies in zip((a, b), held, strict=True):
        assert all(torch.equal(field, kept) for field, kept in zip(of, copies, strict=True))


def test_the_batch_is_left_as_it_was_and_no_gradient_is_recorded() -> None:
    x = normal(5, 3).requires_grad_()
    before = x.detach().clone()
    result = moments(x)
    assert torch.equal(x.detach(), before)
    assert not any(field.requires_grad for field in result)


def test_samples_with_different_channels_do_not_merge() -> None:
    with pytest.raises(ValueError, match=r"2.*3|3.*2"):
        merge(moments(normal(5, 2)), moments(normal(5, 3)))
    with pytest.raises(ValueError, match=r"1.*3|3.*1"):
        merge(moments(normal(5, 1)), moments(normal(5, 3)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_channel_only(value: float) -> None:
    x = normal(5, 3)
    x[2, 1] = value
    of = merge(moments(x), moments(normal(7, 3)))
    assert of.mean.isfinite().tolist() == [True, False, True]
    assert variance(of).isfinite().tolist() == [True, False, True]
