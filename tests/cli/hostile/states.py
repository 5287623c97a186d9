"""State dicts that are none, or have what no BatchNorm layer has."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.cli.hostile.writing import entry, hostile, layer, saved, state, tensors


@hostile()
def cyclic_dictionary(folder: Path) -> Path:
    content: dict[str, Any] = {"a": {}}
    for number in range(300):
        content["a"][f"again{number}"] = content
    content["a"]["itself"] = content["a"]
    return saved(folder, content)


@hostile()
def nested_deep(folder: Path) -> Path:
    content: Any = layer()
    for _ in range(200):
        content = {"inner": content}
    return saved(folder, content)


@hostile()
def nested_wide(folder: Path) -> Path:
    shared: Any = {}
    for _ in range(30):
        shared = {"left": shared, "right": shared, "again": [shared] * 20}
    return saved(folder, shared)


@hostile()
def keys_that_are_no_text(folder: Path) -> Path:
    return saved(folder, {0: torch.ones(3), None: {1.5: torch.ones(2), (1, 2): {True: torch.ones(1)}}})


@hostile()
def no_batch_norm(folder: Path) -> Path:
    return saved(folder, nn.Linear(2, 2).state_dict())


@hostile()
def values_that_are_no_tensors(folder: Path) -> Path:
    return saved(folder, {"bn.running_mean": [0.0, 0.0], "bn.running_var": "one", "bn.weight": None})


@hostile(1)
def mean_without_variance(folder: Path) -> Path:
    return state(folder, running_var=None)


@hostile(1)
def variance_without_mean(folder: Path) -> Path:
    return state(folder, running_mean=None)


@hostile(1)
def different_sizes(folder: Path) -> Path:
    return state(folder, running_var=torch.ones(5))


@hostile()
def two_dimensions(folder: Path) -> Path:
    return state(folder, running_mean=torch.zeros(2, 2), running_var=torch.ones(2, 2))


@hostile()
def no_dimension(folder: Path) -> Path:
    return state(folder, running_mean=torch.tensor(0.0), running_var=torch.tensor(1.0))


@hostile()
def no_channels(folder: Path) -> Path:
    return state(folder, running_mean=torch.zeros(0), running_var=torch.ones(0), weight=None, bias=None)


@hostile(1)
def meta_tensors(folder: Path) -> Path:
    return state(folder, running_mean=torch.zeros(4, device="meta"), running_var=torch.ones(4, device="meta"))


@hostile(1)
def sparse_tensors(folder: Path) -> Path:
    return state(folder, running_mean=torch.ones(4).to_sparse())


@hostile(1)
def quantized_tensors(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch gives such tensors up
        return state(folder, running_mean=torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))


@hostile(1)
def complex_tensors(folder: Path) -> Path:
    return state(folder, running_mean=torch.ones(4, dtype=torch.complex64))


@hostile()
def lazy_layer(folder: Path) -> Path:
    return saved(folder, {"bn.running_mean": nn.parameter.UninitializedBuffer(), "bn.running_var": torch.ones(4)})


@hostile()
def billion_channels_of_four_bytes(folder: Path) -> Path:
    one = torch.ones(1).expand(10**9)
    return saved(folder, {"bn.running_mean": one, "bn.running_var": one})


@hostile()
def many_names_for_more_than_any_network_has(folder: Path) -> Path:
    path = folder / "file.safetensors"
    size = 4 * (9 << 20)
    header = {"bn.running_mean": entry([9 << 20], 0, size), "bn.running_var": entry([9 << 20], size, 2 * size)}
    tensors(folder, header)
    os.truncate(path, path.stat().st_size + 2 * size)
    return path


@hostile(0)
def counter_that_is_none(folder: Path) -> Path:
    return state(folder, num_batches_tracked=torch.tensor(float("nan")))


@hostile(0)
def counter_of_many(folder: Path) -> Path:
    return state(folder, num_batches_tracked=torch.tensor([-1, 2, 3]))


@hostile(0)
def weight_of_another_layer(folder: Path) -> Path:
    return state(folder, weight=torch.ones(3, 3))


@hostile(0)
def names_that_paint_the_terminal(folder: Path) -> Path:
    return saved(folder, {name.replace("bn.", "\x1b[31m\r\nbn\x00."): value for name, value in layer().items()})


@hostile(0)
def name_of_a_hundred_thousand(folder: Path) -> Path:
    return saved(folder, {name.replace("bn.", "a" * 100_000 + "."): value for name, value in layer().items()})


@hostile(0)
def name_with_half_a_character(folder: Path) -> Path:
    return saved(folder, {name.replace("bn.", "\ud800."): value for name, value in layer().items()})


@hostile(0)
def callbacks_that_lie(folder: Path) -> Path:
    callbacks: dict[Any, Any] = {
        "BatchNormFreezer": {"report": {"layers": 7, "violations": [[]]}},
        "BatchNormMonitor": {"reference": {"names": ["a"], "channels": "b"}, "history": []},
        "PreciseBatchNorm": {"done_at_step": "never"},
        "TaskBatchNorm": {"sets": 3, "tasks": None, "default": {}, "layers": 1},
        0: "zero",
    }
    callbacks["BatchNormFreezer[itself]"] = callbacks
    return saved(folder, {"state_dict": layer(), "callbacks": callbacks, "epoch": [], "global_step": "\x1b[2J"})


@hostile(0)
def dictionaries_that_each_other_holds_a_thousand_times(folder: Path) -> Path:
    shared: Any = layer()
    for _ in range(3):
        shared = {f"key{number}": shared for number in range(1000)}
    return saved(folder, {**layer(), "inner": shared})


@hostile(0)
def record_of_one_layer_under_many_names(folder: Path) -> Path:
    counter = torch.tensor(100)
    parts = {
        "running_mean": torch.rand(200_000),
        "running_var": torch.rand(200_000) + 1,
        "num_batches_tracked": counter,
    }
    content = {f"bn{number}.{name}": value for number in range(300) for name, value in parts.items()}
    record = {f"bn{number}": [1.0, 2, 3] for number in range(300)}
    return saved(folder, {"state_dict": content, "lightning_bn": {"format": 1, "recalibrated": {"state_dict": record}}})


@hostile(0)
def record_that_is_none(folder: Path) -> Path:
    record = {"bn": [float("nan"), -1, "x"], 3: None, "a": {"b": [torch.zeros(2)]}}
    content = {"state_dict": layer(), "lightning_bn": {"format": 1, "recalibrated": {"state_dict": record, 2: 3}}}
    return saved(folder, content)


def lists(levels: int) -> Any:
    """A list that is small in a file, and doubles with each level where it is written out."""
    value: Any = ["a name" * 5]
    for _ in range(levels):
        value = [value, value]
    return value


@hostile(0)
def task_that_is_lists_in_lists(folder: Path) -> Path:
    tasks = {"layers": ["bn"], "tasks": ["a", lists(23)], "default": "a", "sets": {"a": {}}}
    return saved(folder, {"state_dict": layer(), "callbacks": {"TaskBatchNorm": tasks}})


@hostile(0)
def report_of_lists_in_lists(folder: Path) -> Path:
    report = {"layers": ["bn"], "task_layers": [], "violations": lists(23), "mechanism": lists(23)}
    states = {"BatchNormFreezer": {"report": report}, "BatchNormMonitor": {"warming_up": [lists(23)]}}
    return saved(folder, {"state_dict": layer(), "callbacks": states})


@hostile(0)
def dictionaries_under_many_keys(folder: Path) -> Path:
    shared: Any = {"a": 1}
    for _ in range(3):
        shared = {f"k{index}": shared for index in range(1500)}
    tasks = {"layers": ["bn"], "tasks": ["a", "b"], "default": "a", "sets": {}}
    return saved(folder, {"state_dict": layer(), "w": shared, "callbacks": {"TaskBatchNorm": tasks}})
