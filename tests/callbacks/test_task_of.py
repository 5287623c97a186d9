"""Which task a batch belongs to: by a key or a function."""

from typing import Any

import pytest
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_bn.callbacks._task_of import TaskOf


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("det", "det"),
        (["det", "det"], "det"),
        (("det",), "det"),
        (3, "3"),
        (torch.tensor(3), "3"),
        (torch.tensor([3, 3, 3]), "3"),
        ([torch.tensor(1), torch.tensor(1)], "1"),
    ],
    ids=str,
)
def test_a_batch_belongs_to_the_one_task_under_its_key(value: Any, expected: str) -> None:
    assert TaskOf("task")({"x": 0, "task": value}, 0) == expected


@pytest.mark.parametrize(
    ("value", "way_out"),
    [
        (["det", "seg"], "Each batch must be of one task"),
        (torch.tensor([0, 1]), "Each batch must be of one task"),
        ([], "Give one task for the whole batch"),
    ],
    ids=str,
)
def test_several_tasks_or_none_in_one_batch_are_an_error(value: Any, way_out: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"task_key='task': one batch holds the tasks .*{way_out}"):
        TaskOf("task")({"task": value}, 0)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"x": 1, "y": 2}, r"a dict that has only the keys \['x', 'y'\]"),
        ((1, 2), "a tuple"),
        (torch.ones(2), "a Tensor"),
    ],
    ids=str,
)
def test_a_batch_without_the_key_is_an_error_that_shows_what_it_is(batch: Any, found: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"task_key='task': the batch is {found}.*import path"):
        TaskOf("task")(batch, 0)


def test_without_a_key_only_contexts_tell() -> None:
    assert TaskOf(None)({"task": "det"}, 0) is None


def test_a_function_of_batch_and_index_is_imported_by_its_path() -> None:
    by_index = TaskOf("tests.callbacks.freezing_fits.task_by_index")
    assert [by_index(None, index) for index in range(3)] == ["det", "seg", "det"]


def test_a_function_that_returns_none_names_no_task() -> None:
    assert TaskOf("tests.callbacks.test_task_of.no_task")({"x": 1}, 0) is None


def no_task(batch: Any, batch_idx: int) -> None:
    """For ``task_key``."""


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_package.function", "No module named 'no_such_package'"),
        ("math.no_such_function", "no_such_function"),
        ("math.pi", "is a float, not a function"),
        ("os.path", "is a module, not a function"),
    ],
)
def test_a_path_that_leads_nowhere_is_an_error_when_it_is_given(path: str, said: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"task_key='{path}'.*{said}"):
        TaskOf(path)
