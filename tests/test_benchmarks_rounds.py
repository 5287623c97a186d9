"""What the benchmarks measure with: device, clock, counts of operators and launches, fits that take turns."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The modules that the benchmarks share; they import each other from their folder."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import _fits
    import _launches
    import _rounds

    yield SimpleNamespace(fits=_fits, launches=_launches, rounds=_rounds)
    torch.set_num_threads(threads)


def read(launches: ModuleType, x: torch.Tensor) -> dict[str, int]:
    with launches.counting(x.device) as counts:
        ((x + 1) * 2).sum().item()
    return counts


def hidden(*command: str) -> subprocess.CompletedProcess[str]:
    """A command that finds no CUDA device."""
    hide = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=hide, capture_output=True, text=True, check=False)


def test_without_a_cuda_device_a_benchmark_says_so() -> None:
    ended = hidden(sys.executable, "benchmarks/frozen_memory.py", "--device", "cuda")
    assert ended.returncode == 2
    assert (ended.stdout, ended.stderr) == ("", "No CUDA device here: nothing was measured.\n")


def test_operators_are_counted_without_those_that_they_call(benchmarks: SimpleNamespace) -> None:
    assert read(benchmarks.launches, torch.ones(3)) == {"operators": 4, "values read": 1}


def test_operators_of_the_backward_pass_are_counted(benchmarks: SimpleNamespace) -> None:
    x, gradient = torch.ones(3, requires_grad=True), torch.ones(3)
    with benchmarks.launches.counting(CPU) as forward:
        y = x.exp()
    with benchmarks.launches.counting(CPU) as backward:
        y.backward(gradient)
    # The product with the gradient, and the gradient that is kept.
    assert forward["operators"] == 1
    assert backward["operators"] == 2


def test_nothing_is_counted_as_nothing(benchmarks: SimpleNamespace) -> None:
    with benchmarks.launches.counting(CPU) as counts:
        pass
    assert counts == {"operators": 0, "values read": 0}


def test_launches_copies_and_synchronizations_go_by_their_names(benchmarks: SimpleNamespace) -> None:
    names = [
        "aten::add",
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernel",
        "cudaGraphLaunch",
        "void at::native::vectorized_elementwise_kernel<4, Launch>",
        "aten::item",
        "aten::_local_scalar_dense",
        "cudaMemcpyAsync",
        "Memcpy DtoH (Device -> Pinned)",
        "Memcpy HtoD (Pageable -> Device)",
        "Memcpy DtoD (Device -> Device)",
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaStreamIsCapturing",
    ]
    events = [SimpleNamespace(name=name, cpu_parent=None) for name in names]
    assert benchmarks.launches.count(events, CUDA) == {"launches": 4, "copies": 1, "waits": 2, "values read": 1}


def test_the_clock_reads_processor_time_on_a_cpu(benchmarks: SimpleNamespace) -> None:
    clock = benchmarks.rounds.Clock(CPU)
    assert clock.warm_up == 0
    assert clock.seconds([(1.0, 1.5), (2.0, 5.0)]) == [0.5, 3.0]
    before = clock.now()
    torch.randn(300, 300) @ torch.randn(300, 300)
    [taken] = clock.seconds([(before, clock.now())])
    assert taken > 0


def fits(benchmarks: SimpleNamespace, device: torch.device) -> None:
    def rival(layers: int) -> tuple[nn.Module, list[object]]:
        return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(layers))), []

    taken = benchmarks.fits.fit_in_turns(
        {"one": lambda: rival(1), "two": lambda: rival(2), "one again": lambda: rival(1)},
        torch.randn(4, 3, device=device),
        turns=2,
        steps=3,
    )
    # The first step of each turn is not counted, nor are the turns for warming up.
    assert {name: len(seconds) for name, seconds in taken.seconds.items()} == {"one": 4, "two": 4, "one again": 4}
    assert all(second > 0 for seconds in taken.seconds.values() for second in seconds)
    column = next(iter(taken.counts["one"]))
    assert taken.counts["one again"] == taken.counts["one"]
    assert taken.counts["two"][column] > taken.counts["one"][column] > 0


def test_fits_in_turns_are_timed_and_counted(benchmarks: SimpleNamespace) -> None:
    fits(benchmarks, CPU)


@pytest.mark.gpu
def test_fits_in_turns_are_timed_and_counted_on_cuda(benchmarks: SimpleNamespace) -> None:
    fits(benchmarks, CUDA)


@pytest.mark.gpu
def test_launches_are_counted_on_cuda(benchmarks: SimpleNamespace) -> None:
    x = torch.ones(3, device=CUDA)
    assert read(benchmarks.launches, x) == {"launches": 3, "copies": 1, "waits": 1, "values read": 1}


@pytest.mark.gpu
def test_the_clock_reads_events_on_cuda(benchmarks: SimpleNamespace) -> None:
    clock = benchmarks.rounds.Clock(CUDA)
    x = torch.randn(2000, 2000, device=CUDA)
    marks = [clock.now()]
    for times in (1, 50):
        for _ in range(times):
            x @ x
        marks.append(clock.now())
    first, second = clock.seconds([(marks[0], marks[1]), (marks[1], marks[2])])
    assert first > 0
    assert second > 0
