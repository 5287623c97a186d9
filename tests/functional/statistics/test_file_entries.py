"""State dicts in what a file holds, where a dictionary stands under many keys."""

from typing import Any

import pytest
from torch import nn

from lightning_bn.functional.statistics.file_entries import find_entry, state_dicts_in


class Counted(dict[str, Any]):
    """Counts how often it was looked through."""

    looked = 0

    def items(self) -> Any:
        self.looked += 1
        return super().items()


def test_a_dictionary_with_nothing_in_it_is_looked_through_once_at_a_depth():
    innermost = Counted(a=1)
    middle = {f"k{index}": innermost for index in range(50)}
    content = {f"k{index}": middle for index in range(50)}
    assert state_dicts_in({**content, "model": nn.BatchNorm1d(2).state_dict()}).keys() == {"model"}
    assert innermost.looked == 1


def test_one_with_tensors_is_found_under_each_of_its_keys():
    state = nn.BatchNorm1d(2).state_dict()
    shared = {"inner": dict(state)}
    content = {"first": shared, "second": shared}
    assert list(state_dicts_in(content)) == ["first.inner", "second.inner"]
    found = find_entry(content, {"running_mean": None}, "no", key="second.inner")
    assert found.key == "second.inner"
    with pytest.raises(ValueError, match=r"key='first.inner'.* or key='second.inner'"):
        find_entry(content, {"running_mean": None}, "no")


def test_more_than_any_checkpoint_has_are_refused():
    content: Any = nn.BatchNorm1d(2).state_dict()
    for _ in range(3):
        content = {f"k{index}": content for index in range(30)}
    with pytest.raises(ValueError, match="more than 10,000 state dicts"):
        state_dicts_in(content)
