"""Each measure of drift against closed forms, quadrature and Monte Carlo in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from lightning_bn.functional.statistics.drift_measures import MEASURES, drift
from lightning_bn.functional.statistics.snapshots import Snapshot, take_snapshot
from lightning_bn.functional.statistics.summary import DriftSummary, percentile_95, summarize
from tests.models import SMALL_RESNET_NAMES, SmallResNet, fill_statistics

EPS = 1e-3


def layer_with(mean: object, var: object, *, weight: object = None, eps: float = EPS) -> nn.BatchNorm1d:
    """A float64 layer in eval mode that holds the given statistics."""
    mean, var = torch.tensor(mean, dtype=torch.float64), torch.tensor(var, dtype=torch.float64)
    layer = nn.BatchNorm1d(len(mean), eps=eps, dtype=torch.float64).eval()
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    layer.num_batches_tracked.fill_(5)
    if weight is not None:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(weight, dtype=torch.float64))
            layer.bias.fill_(0.7)
    return layer


def of(*layers: nn.Module) -> Snapshot:
    return take_snapshot(nn.ModuleDict({f"layer{i}": layer for i, layer in enumerate(layers)}))


MEANS = [0.0, 1.0, -2.0, 0.3, 5.0]
VARS = [1.0, 0.25, 4.0, 1e-2, 30.0]
NEW_MEANS = [0.5, 1.0, -2.5, -0.3, -4.0]
NEW_VARS = [1.0, 1.0, 0.5, 3e-2, 31.0]
WEIGHT = [1.0, -2.0, 0.0, 0.1, 3.0]


def example() -> tuple[nn.BatchNorm1d, nn.BatchNorm1d]:
    return layer_with(MEANS, VARS, weight=WEIGHT), layer_with(NEW_MEANS, NEW_VARS, weight=WEIGHT)


def gaussians() -> tuple[Normal, Normal]:
    """The channels as distributions, eps added to both variances."""
    a, b = example()
    return (Normal(a.running_mean, (a.running_var + EPS).sqrt()), Normal(b.running_mean, (b.running_var + EPS).sqrt()))


def measured(measure: str) -> Tensor:
    a, b = example()
    (values,) = drift(of(a), of(b), measure).values()
    return values


def assert_close(values: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(values, expected, rtol=rtol, atol=1e-14)


def integral(function: object, low: float = -60.0, high: float = 60.0, steps: int = 1_200_001) -> Tensor:
    x = torch.linspace(low, high, steps, dtype=torch.float64)
    return torch.stack([torch.trapezoid(function(x, c), x) for c in range(len(MEANS))])  # type: ignore[operator]


# --- each measure ------------------------------------------------------------------------------------------------


def test_the_measures_are_these() -> None:
    assert set(MEASURES) == {"jeffreys", "wasserstein", "mean_shift", "log_variance_ratio", "hellinger", "output"}


def test_jeffreys_is_the_sum_of_both_kullback_leibler_divergences() -> None:
    p, q = gaussians()
    assert_close(measured("jeffreys"), kl_divergence(p, q) + kl_divergence(q, p))


def test_jeffreys_is_the_default() -> None:
    a, b = map(of, example())
    assert torch.equal(drift(a, b)["layer0"], drift(a, b, "jeffreys")["layer0"])


def test_wasserstein_is_the_squared_distance_of_quantiles_in_units_of_the_reference_variance() -> None:
    p, q = gaussians()
    # In one dimension W2^2 is the mean of (Q1(u) - Q0(u))^2; both quantile functions are linear in the normal's.
    nodes, weights = gauss_hermite(4)
    expected = sum(
        w * ((q.loc + q.scale * u) - (p.loc + p.scale * u)) ** 2 for u, w in zip(nodes, weights, strict=True)
    )
    assert_close(measured("wasserstein"), expected / p.variance)


def test_mean_shift_is_signed_and_in_standard_deviations_of_the_reference() -> None:
    p, q = gaussians()
    assert_close(measured("mean_shift"), (q.mean - p.mean) / p.stddev)
    assert measured("mean_shift")[0] > 0 > measured("mean_shift")[2]


def test_log_variance_ratio_is_signed_and_the_logarithm_of_new_to_old() -> None:
    p, q = gaussians()
    assert_close(measured("log_variance_ratio"), q.variance.log() - p.variance.log(), rtol=1e-10)
    assert measured("log_variance_ratio")[1] > 0 > measured("log_variance_ratio")[2]


def test_hellinger_is_the_distance_of_the_densities() -> None:
    p, q = gaussians()

    def integrand(x: Tensor, c: int) -> Tensor:
        a, b = (Normal(d.loc[c], d.scale[c]).log_prob(x).exp() for d in (p, q))
        return (a.sqrt() - b.sqrt()) ** 2 / 2

    assert_close(measured("hellinger"), integral(integrand).sqrt(), rtol=1e-7)


def gauss_hermite(order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights that integrate polynomials up to degree 2 * order - 1 exactly under the normal distribution."""
    # Golub and Welsch: the eigenvalues of the Jacobi matrix of the (probabilists') Hermite polynomials.
    off = torch.arange(1, order, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0] ** 2


def test_output_is_the_mean_squared_change_of_the_layers_eval_output() -> None:
    a, b = example()
    p, _ = gaussians()
    nodes, weights = gauss_hermite(4)
    x = p.loc + p.scale * nodes[:, None]
    with torch.no_grad():
        expected = (weights[:, None] * (b(x) - a(x)) ** 2).sum(0)
    assert_close(measured("output"), expected, rtol=1e-11)


def test_output_agrees_with_a_monte_carlo_run_of_the_layer() -> None:
    a, b = example()
    p, _ = gaussians()
    x = p.loc + p.scale * torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        changes = (b(x) - a(x)) ** 2
    error = changes.std(0) / len(x) ** 0.5
    assert ((measured("output") - changes.mean(0)).abs() <= 5 * error + 1e-12).all()


def test_output_ignores_channels_that_the_layer_ignores() -> None:
    values = measured("output")
    assert values[2] == 0  # weight 0
    assert values[0] > 0


def test_output_of_a_layer_without_parameters_takes_weight_one() -> None:
    layers = [nn.BatchNorm1d(2, affine=False, dtype=torch.float64) for _ in range(2)]
    layers[1].running_mean.fill_(1.0)
    plain = [layer_with([0.0, 0.0], [1.0, 1.0], eps=1e-5), layer_with([1.0, 1.0], [1.0, 1.0], eps=1e-5)]
    assert_close(drift(*map(of, layers), "output")["layer0"], drift(*map(of, plain), "output")["layer0"])


@pytest.mark.parametrize(("change", "jeffreys"), [((0.0, 1.56), 0.1), ((0.32, 1.0), 0.1), ((0.0, 2.0), 0.25)])
def test_the_rules_of_thumb_for_jeffreys_hold(change: tuple[float, float], jeffreys: float) -> None:
    mean, var = change
    values = drift(of(layer_with([0.0], [1.0], eps=0.0)), of(layer_with([mean], [var], eps=0.0)))["layer0"]
    assert values.item() == pytest.approx(jeffreys, rel=0.03)


numbers = st.floats(-1e3, 1e3)
variances = st.floats(1e-4, 1e4)


@settings(max_examples=60, deadline=None)
@given(numbers, variances, numbers, variances)
def test_the_closed_forms_hold_everywhere(m0: float, v0: float, m1: float, v1: float) -> None:
    a, b = of(layer_with([m0], [v0])), of(layer_with([m1], [v1]))
    got = {measure: drift(a, b, measure)["layer0"].item() for measure in MEASURES}
    z, r = (m1 - m0) / math.sqrt(v0 + EPS), (v1 + EPS) / (v0 + EPS)
    # The pair (J, W2) through the Kullback-Leibler divergences, written out; not the code's own formula.
    forward = 0.5 * (1 / r + z * z / r - 1 + math.log(r))
    backward = 0.5 * (r + z * z - 1 - math.log(r))
    assert got["jeffreys"] == pytest.approx(forward + backward, rel=1e-8, abs=1e-12)
    assert got["wasserstein"] == pytest.approx(z * z + (math.sqrt(r) - 1) ** 2, rel=1e-8, abs=1e-12)
    assert got["mean_shift"] == pytest.approx(z, rel=1e-12)
    assert got["log_variance_ratio"] == pytest.approx(math.log(r), rel=1e-9, abs=1e-12)
    affinity = math.sqrt(2 * math.sqrt(r) / (1 + r)) * math.exp(-0.25 * z * z / (1 + r))
    assert got["hellinger"] ** 2 == pytest.approx(1 - affinity, rel=1e-8, abs=1e-12)
    assert 0 <= got["hellinger"] <= 1
    assert got["output"] == pytest.approx((1 / math.sqrt(r) - 1) ** 2 + z * z / r, rel=1e-8, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(numbers, variances, numbers, variances, st.floats(1e-2, 1e2), numbers)
def test_a_change_of_units_changes_nothing(m0: float, v0: float, m1: float, v1: float, gain: float, by: float) -> None:
    pairs = [(m0, v0), (m1, v1)]
    a, b = (of(layer_with([m], [v], eps=0.0)) for m, v in pairs)
    c, d = (of(layer_with([gain * m + by], [gain**2 * v], eps=0.0)) for m, v in pairs)
    for measure in MEASURES:
        x, y = drift(a, b, measure)["layer0"].item(), drift(c, d, measure)["layer0"].item()
        assert x == pytest.approx(y, rel=1e-6, abs=1e-6), measure


@settings(max_examples=30, deadline=None)
@given(numbers, variances, numbers, variances)
def test_jeffreys_and_hellinger_are_symmetric(m0: float, v0: float, m1: float, v1: float) -> None:
    a, b = of(layer_with([m0], [v0])), of(layer_with([m1], [v1]))
    for measure in ("jeffreys", "hellinger"):
        there, back = drift(a, b, measure)["layer0"].item(), drift(b, a, measure)["layer0"].item()
        assert there == pytest.approx(back, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("measure", ["jeffreys", "wasserstein", "hellinger", "output"])
def test_tiny_changes_are_measured_as_tiny_not_as_rounding(measure: str) -> None:
    a, b = of(layer_with([0.0], [1.0], eps=0.0)), of(layer_with([1e-7], [1.0], eps=0.0))
    expected = {"jeffreys": 1e-14, "wasserstein": 1e-14, "output": 1e-14, "hellinger": math.sqrt(1e-14 / 8)}
    assert drift(a, b, measure)["layer0"].item() == pytest.approx(expected[measure], rel=1e-9, abs=0)


# --- extremes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equal_statistics_are_exactly_zero(measure: str, dtype: torch.dtype) -> None:
    model = fill_statistics(SmallResNet().to(dtype))
    for values in drift(take_snapshot(model), take_snapshot(model), measure).values():
        assert torch.equal(values, torch.zeros(4, dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e12))
def test_equal_statistics_are_exactly_zero_whatever_their_size(mean: float, var: float) -> None:
    one, same = of(layer_with([mean], [var])), of(layer_with([mean], [var]))
    for measure in MEASURES:
        assert drift(one, same, measure)["layer0"].item() == 0.0, measure


@pytest.mark.parametrize("measure", MEASURES)
def test_zero_variances_are_measured_through_eps(measure: str) -> None:
    a, b = of(layer_with([0.0, 1.0], [0.0, 0.0])), of(layer_with([0.0, 1.0], [0.0, EPS]))
    values = drift(a, b, measure)["layer0"]
    assert values[0] == 0
    doubled = drift(of(layer_with([1.0], [1.0], eps=0.0)), of(layer_with([1.0], [2.0], eps=0.0)), measure)["layer0"]
    assert_close(values[1:], doubled, rtol=1e-10)


@pytest.mark.parametrize("measure", MEASURES)
def test_far_apart_is_finite(measure: str) -> None:
    a, b = of(layer_with([0.0], [0.0], eps=1e-5)), of(layer_with([1e4], [1e8], eps=1e-5))
    for values in (drift(a, b, measure)["layer0"], drift(b, a, measure)["layer0"]):
        assert values.isfinite().all()


@pytest.mark.parametrize("measure", MEASURES)
def test_one_channel_gives_one_value(measure: str) -> None:
    values = drift(of(layer_with([0.0], [1.0])), of(layer_with([1.0], [2.0])), measure)["layer0"]
    assert values.shape == (1,)
    assert values.dtype == torch.float64


def test_each_layer_has_its_own_eps_and_channels() -> None:
    a = of(layer_with([0.0], [0.0], eps=1e-2), layer_with([0.0, 0.0], [0.0, 0.0], eps=1e-4))
    b = of(layer_with([1.0], [0.0], eps=1e-2), layer_with([1.0, 2.0], [0.0, 0.0], eps=1e-4))
    values = drift(a, b, "mean_shift")
    assert list(values) == ["layer0", "layer1"]
    assert_close(values["layer0"], torch.tensor([10.0], dtype=torch.float64))
    assert_close(values["layer1"], torch.tensor([100.0, 200.0], dtype=torch.float64))


def test_float32_statistics_are_measured_in_float64() -> None:
    a, b = fill_statistics(SmallResNet(), seed=0), fill_statistics(SmallResNet(), seed=1)
    values = drift(take_snapshot(a), take_snapshot(b))
    doubles = drift(take_snapshot(a.double()), take_snapshot(b.double()))
    for name in values:
        assert values[name].dtype == torch.float64
        assert_close(values[name], doubles[name])


def test_the_snapshots_are_left_as_they_were() -> None:
    a, b = map(of, example())
    held = a.mean.clone(), a.var.clone(), b.mean.clone(), b.var.clone()
    for measure in MEASURES:
        drift(a, b, measure)
        summarize(a, b, measure)
    assert all(torch.equal(x, y) for x, y in zip(held, (a.mean, a.var, b.mean, b.var), strict=True))


@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_not_finite_is_not_measured_as_small(measure: str) -> None:
    bad = {"mean_shift": [float("nan"), 0.0]}.get(measure, [0.0, 0.0])
    var = [1.0, 1.0] if measure == "mean_shift" else [float("nan"), 1.0]
    values = drift(of(layer_with([0.0, 0.0], [1.0, 1.0])), of(layer_with(bad, var)), measure)["layer0"]
    assert not values[0].isfinite()
    assert values[1] == 0


def of_channels(*channels: int) -> Snapshot:
    return of(*[layer_with([0.0] * size, [1.0] * size) for size in channels])


# --- errors ------------------------------------------------------------------------------------------------------


def test_an_unknown_measure_is_an_error_that_lists_the_known_ones() -> None:
    a, b = map(of, example())
    for call in (drift, summarize):
        with pytest.raises(ValueError, match="jefreys") as caught:
            call(a, b, "jefreys")  # type: ignore[operator]
        assert "jeffreys" in str(caught.value)


def test_snapshots_of_different_layers_are_an_error_that_names_one() -> None:
    one, two = of_channels(1), of_channels(1, 1)
    for pair in ((one, two), (two, one), (two, of_channels(1, 2)), (of_channels(1, 2), two)):
        for call in (drift, summarize):
            with pytest.raises(ValueError, match="layer1") as caught:
                call(*pair)  # type: ignore[operator]
            assert "layer0" not in str(caught.value)  # that one fits


# --- summaries ---------------------------------------------------------------------------------------------------


def models() -> tuple[Snapshot, Snapshot]:
    return take_snapshot(fill_statistics(SmallResNet(), 0)), take_snapshot(fill_statistics(SmallResNet(), 1))


@pytest.mark.parametrize("measure", ["jeffreys", "wasserstein", "hellinger", "output"])
def test_a_summary_is_over_all_channels_of_all_layers(measure: str) -> None:
    a, b = models()
    per_layer = drift(a, b, measure)
    values = torch.cat(list(per_layer.values()))
    summary = summarize(a, b, measure, threshold=float(values.median()))
    assert isinstance(summary, DriftSummary)
    assert summary.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert summary.p95 == pytest.approx(torch.quantile(values, 0.95).item(), rel=1e-12)
    assert summary.max == pytest.approx(values.max().item(), rel=1e-12)
    worst = max(per_layer, key=lambda name: per_layer[name].max().item())
    assert summary.worst_layer == worst
    assert summary.worst_channel == int(per_layer[worst].argmax())
    assert summary.share_above == pytest.approx((values > values.median()).double().mean().item())


def test_layers_count_by_their_channels() -> None:
    a = of(layer_with([0.0] * 9, [1.0] * 9), layer_with([0.0], [1.0]))
    b = of(layer_with([0.0] * 9, [1.0] * 9), layer_with([3.0], [1.0]))
    summary = summarize(a, b, "wasserstein", threshold=1.0)
    assert summary.mean == pytest.approx(summary.max / 10)
    assert summary.share_above == pytest.approx(0.1)
    assert (summary.worst_layer, summary.worst_channel) == ("layer1", 0)


def test_the_worst_channel_counts_within_its_layer() -> None:
    a = of(layer_with([0.0] * 3, [1.0] * 3), layer_with([0.0] * 3, [1.0] * 3))
    b = of(layer_with([0.0] * 3, [1.0] * 3), layer_with([0.1, 0.2, 2.0], [1.0] * 3))
    summary = summarize(a, b)
    assert (summary.worst_layer, summary.worst_channel) == ("layer1", 2)


@pytest.mark.parametrize("measure", ["mean_shift", "log_variance_ratio"])
def test_the_worst_of_a_signed_measure_is_the_farthest_on_either_side(measure: str) -> None:
    a = of(layer_with([0.0, 0.0], [1.0, 1.0]), layer_with([0.0, 0.0], [1.0, 1.0]))
    b = of(layer_with([1.0, 0.0], [2.0, 1.0]), layer_with([0.0, -9.0], [1.0, 0.01]))
    summary = summarize(a, b, measure, threshold=2.0)
    assert (summary.worst_layer, summary.worst_channel) == ("layer1", 1)
    assert abs(summary.max) == pytest.approx(drift(a, b, measure)["layer1"].abs().max().item())
    assert summary.share_above == pytest.approx(0.25)


def test_the_worst_channel_is_described_in_plain_units() -> None:
    a = of(layer_with([0.0, 0.0], [1.0, 4.0], eps=0.0), layer_with([0.0], [1.0], eps=0.0))
    b = of(layer_with([0.0, 6.0], [1.0, 1.0], eps=0.0), layer_with([0.1], [1.1], eps=0.0))
    for measure in ("jeffreys", "hellinger", "output"):
        summary = summarize(a, b, measure)
        assert (summary.worst_layer, summary.worst_channel) == ("layer0", 1)
        assert (summary.variance_ratio, summary.mean_shift) == pytest.approx((0.25, 3.0))


def test_no_drift_is_summarized_as_zeros() -> None:
    a, _ = models()
    summary = summarize(a, a, threshold=0.0)
    assert (summary.mean, summary.p95, summary.max, summary.share_above) == (0.0, 0.0, 0.0, 0.0)
    assert summary.worst_layer in SMALL_RESNET_NAMES


def test_without_a_threshold_no_share_is_made_up() -> None:
    a, b = models()
    share = summarize(a, b).share_above
    assert share is None or math.isnan(share)


def test_a_summary_holds_plain_numbers() -> None:
    a, b = models()
    summary = summarize(a, b, threshold=0.1)
    assert [type(x) for x in (summary.mean, summary.p95, summary.max, summary.share_above)] == [float] * 4
    assert type(summary.worst_channel) is int
    assert type(summary.worst_layer) is str


def test_a_channel_that_is_not_finite_is_the_worst() -> None:
    a = of(layer_with([0.0, 0.0], [1.0, 1.0]), layer_with([0.0, 0.0], [1.0, 1.0]))
    b = of(layer_with([1e3, 0.0], [1.0, 1.0]), layer_with([0.0, 0.0], [1.0, float("nan")]))
    summary = summarize(a, b, threshold=1.0)
    assert (summary.worst_layer, summary.worst_channel) == ("layer1", 1)
    assert not math.isfinite(summary.max)


# --- the largest of each layer -----------------------------------------------------------------------------------


def test_layer_maxima_are_those_of_each_layers_channels() -> None:
    snapshot = of(layer_with(MEANS, VARS), layer_with([0.0], [1.0]), layer_with([0.0, 1.0], [1.0, 2.0]))
    values = torch.tensor([3.0, -1.0, 2.0, 0.0, 1.0, -7.0, 5.0, 6.0], dtype=torch.float64)
    assert snapshot.layout.max(values).tolist() == [3.0, -7.0, 6.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_is_not_finite_is_the_largest_of_its_layer_and_of_no_other(bad: float, at: int) -> None:
    snapshot = of(layer_with([0.0, 1.0], [1.0, 2.0]), layer_with([0.0], [1.0]))
    values = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    values[at] = bad
    largest = snapshot.layout.max(values)
    layer = (0, 0, 1)[at]
    assert repr(float(largest[layer])) == repr(bad)
    assert float(largest[1 - layer]) == (2.0, 1.0)[layer]


@pytest.mark.parametrize("count", [1, 2, 3, 19, 20, 21, 22, 101, 5000])
def test_the_95th_percentile_is_torchs(count: int) -> None:
    values = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    assert float(percentile_95(values)) == pytest.approx(float(values.quantile(0.95)), rel=1e-12)


def test_the_95th_percentile_of_what_is_not_finite() -> None:
    assert float(percentile_95(torch.full((40,), math.inf))) == math.inf
    assert float(percentile_95(torch.tensor([0.0] * 18 + [1.0, math.inf]))) == math.inf
    assert float(percentile_95(torch.tensor([0.0] * 39 + [math.inf]))) == 0.0
    assert math.isnan(float(percentile_95(torch.tensor([0.0] * 39 + [math.nan]))))
