"""What is known of layers between and at samples, without a Trainer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bn.functional import freeze_batch_norm, layer_status
from lightning_bn.functional.layers.status import update_status
from lightning_bn.functional.monitoring import session as monitoring_session
from lightning_bn.functional.monitoring.history import DriftHistory
from lightning_bn.functional.monitoring.measure import to_host
from lightning_bn.functional.monitoring.monitor_state import MonitorState
from lightning_bn.functional.monitoring.sample import Sample
from lightning_bn.functional.monitoring.session import MonitorSession


def batch(seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)) + shift


def watched(updates: int = 100) -> tuple[nn.BatchNorm1d, MonitorSession]:
    """A layer with the statistics of the data, in a session."""
    layer = nn.BatchNorm1d(4)
    for seed in range(updates):
        layer(batch(seed))
    session = MonitorSession({"bn": layer}, 1, history=DriftHistory())
    session.refer_to_now()
    return layer, session


def trained(layer: nn.Module, session: MonitorSession, count: int = 1, shift: float = 0.0) -> None:
    for seed in range(count):
        session.before_batch()
        layer(batch(1000 + seed, shift))
        session.after_batch(batch(0), 1)


def sampled(session: MonitorSession, step: int) -> Sample:
    sample = session.sample(step, 0)
    assert sample is not None
    return sample


def kinds(session: MonitorSession, step: int = 1) -> list[str]:
    return [one.kind for one in sampled(session, step).findings]


class Reads(TorchDispatchMode):
    """Counts single values that are read, for each of which an accelerator would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def test_a_sample_reads_no_value_but_all_of_them_at_once() -> None:
    layer, session = watched()
    trained(layer, session)
    session.sample(1, 0)
    with Reads() as reads:
        session.before_batch()
        session.after_batch(batch(0), 1)
        session.sample(2, 0, right_after=True)
    assert reads.count == 0
    with Reads() as reads:
        float(layer.running_mean[0])  # type: ignore[index]
    assert reads.count == 1, "or it counts nothing"


def test_a_sample_after_a_reset_waits_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, session = watched()
    trained(layer, session)
    session.sample(1, 0)
    copies = []

    def counted(tables):
        copies.append(tables)
        return to_host(tables)

    monkeypatch.setattr(monitoring_session, "to_host", counted)
    session.before_batch()
    layer.reset_running_stats()
    layer(batch(3))
    session.after_batch(batch(0), 2)
    with Reads() as reads:
        sample = session.sample(2, 0, right_after=True)
    assert (reads.count, len(copies)) == (0, 1)
    assert sample is not None
    assert sample.summary.max == 0
    assert [(layer, event) for _, layer, event in session.history.marks] == [("bn", "reset"), ("bn", "warming up")]


@pytest.mark.parametrize(("factors", "found"), [([1e6, 1, 1, 1], []), ([200, 200, 200, 50], ["exploding"])])
def test_it_takes_most_channels_to_explode(factors: list[float], found: list[str]) -> None:
    layer, session = watched()
    trained(layer, session)
    layer.running_var.mul_(torch.tensor(factors))  # type: ignore[union-attr]
    assert kinds(session) == found


def test_what_is_not_finite_is_not_called_exploding_too() -> None:
    layer, session = watched()
    trained(layer, session)
    layer.running_var.fill_(float("inf"))  # type: ignore[union-attr]
    assert kinds(session) == ["not finite"]


@pytest.mark.parametrize(("then", "found"), [(2e-4, []), (1e-3, ["collapsed"])])
def test_a_dead_channel_was_alive_if_its_variance_was_fifty_times_eps(then: float, found: list[str]) -> None:
    layer, session = watched(1000)
    layer.running_var[0] = then  # type: ignore[index]
    session.refer_to_now()
    trained(layer, session)
    layer.running_var[0] = 1e-7  # type: ignore[index]
    assert kinds(session) == found


def test_the_batch_after_a_recalibration_is_not_judged_and_the_next_one_is() -> None:
    layer, session = watched()
    update_status(layer, recalibrated_at=5)
    assert session.recalibrated(5)
    trained(layer, session)
    assert sampled(session, 6).step == 6
    assert session.own.window.judged == 0
    trained(layer, session)
    assert session.own.window.judged == 1


def test_values_that_a_recalibration_wrote_are_no_fault_of_a_layer_that_is_frozen_then() -> None:
    layer, session = watched()
    freeze_batch_norm(layer)
    trained(layer, session)
    session.sample(1, 0)
    layer.running_mean.add_(1)  # type: ignore[union-attr]
    update_status(layer, recalibrated_at=5)
    trained(layer, session)
    assert kinds(session, 6) == []
    layer.running_mean.add_(1)  # type: ignore[union-attr]
    trained(layer, session)
    assert kinds(session, 7) == ["frozen but moves"]
    assert layer_status(layer).recalibrated_at == 5


def test_momentum_is_read_again_when_a_layer_was_reset() -> None:
    layer, session = watched()
    layer.reset_running_stats()
    layer.momentum = None
    trained(layer, session)
    session.sample(1, 0)
    # One update of a cumulative average leaves nothing of the initial values.
    assert session.own.warm_up.layers == frozenset()


def test_a_moving_average_far_behind_its_batches_lags() -> None:
    layer, session = watched()
    layer.momentum = 0.001
    trained(layer, session, 8, shift=3.0)
    assert kinds(session) == ["lagging"]


def test_a_saved_state_is_read_with_unknown_keys_and_without_known_ones() -> None:
    _, session = watched()
    state = session.state().state_dict()
    assert state["format"] == 1
    read = MonitorState.from_state_dict({**state, "later": 1})
    assert read is not None
    assert session.resume(read) == ""
    bare = MonitorState.from_state_dict({"reference": state["reference"]})
    assert bare is not None
    assert session.resume(bare) == ""
    assert MonitorState.from_state_dict({}) is None
