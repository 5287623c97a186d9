"""Whatever is reachable from an object holds afterwards what it held before."""

import functools
import itertools
import queue
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_bn.callbacks._second_run.object_state import preserved_object_state


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


class Slotted:
    __slots__ = ("later", "value")

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(frozen=True)
class Frozen:
    value: list[int]


def set_item(mapping: Any) -> None:
    mapping["a"] = 5
    mapping["new"] = 6


#: Name -> what is held, and what is done to it.
CHANGES: dict[str, tuple[Any, Any]] = {
    "list": (lambda: [1, 2], lambda value: value.append(3)),
    "list in place": (lambda: [3, 1, 2], lambda value: value.sort()),
    "dict": (lambda: {"a": 1}, set_item),
    "order of a dict": (lambda: {"a": 1, "b": 2}, lambda value: value.update(a=value.pop("a"))),
    "OrderedDict": (lambda: OrderedDict(a=1, b=2), lambda value: value.move_to_end("a")),
    "defaultdict": (lambda: defaultdict(list, a=[1]), lambda value: (value["a"].append(2), value["b"])),
    "Counter": (lambda: Counter("aab"), lambda value: value.update("abc")),
    "set": (lambda: {1, 2}, lambda value: value.add(3)),
    "deque": (lambda: deque([1, 2, 3], maxlen=3), lambda value: value.append(4)),
    "in a tuple": (lambda: ([1],), lambda value: value[0].append(2)),
    "deep": (lambda: {"a": [{"b": deque([{1}])}]}, lambda value: value["a"][0]["b"][0].add(2)),
    "bytes in a dict": (lambda: {"a": b"1"}, set_item),
}


def as_told(value: Any) -> Any:
    """What a container holds, in its order."""
    return list(value.items()) if isinstance(value, dict) else value


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("hold", [Holder, Slotted, lambda value: [value], lambda value: {"x": value}])
def test_containers_hold_what_they_held_and_are_the_same_objects(kind, hold):
    make, change = CHANGES[kind]
    value = make()
    holder = hold(value)
    with preserved_object_state([holder]):
        change(value)
        assert as_told(value) != as_told(make())
    assert as_told(value) == as_told(make())
    assert type(value) is type(make())
    if isinstance(holder, Holder | Slotted):
        assert holder.value is value


def test_after_an_exception_too():
    value = [1]

    def fail() -> None:
        with preserved_object_state([value]):
            value.append(2)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert value == [1]


def test_attributes_that_were_replaced_added_or_deleted_are_as_they_were():
    first = [1]
    holder = Holder(first)
    with preserved_object_state([holder]):
        holder.value = [2]
        holder.more = 3
    assert (holder.value, vars(holder)) == (first, {"value": first})
    assert holder.value is first
    with preserved_object_state([holder]):
        del holder.value
    assert holder.value is first


def test_slot_that_was_filled_inside_is_empty_again():
    holder = Slotted(1)
    with preserved_object_state([holder]):
        holder.value, holder.later = 2, 3
    assert holder.value == 1
    assert not hasattr(holder, "later")


def test_members_of_a_frozen_dataclass_are_followed():
    frozen = Frozen([1])
    with preserved_object_state([frozen]):
        frozen.value.append(2)
    assert frozen.value == [1]


def test_things_that_refer_to_each_other_are_each_looked_at_once():
    one, other = Holder(1), Holder(2)
    one.value, other.value = [other], {"one": one}
    with preserved_object_state([one]):
        other.value["n"] = 1
        one.value.clear()
    assert one.value == [other]
    assert other.value == {"one": one}


def test_chain_longer_than_the_recursion_limit_is_followed():
    end = [1]
    chain: Any = end
    for _ in range(5000):
        chain = [chain]
    with preserved_object_state([chain]):
        end.append(2)
    assert end == [1]


def counting() -> Any:
    state = [0]

    def count() -> int:
        state[0] += 1
        return state[0]

    return count


def counting_by_rebinding() -> Any:
    state = 0

    def count() -> int:
        nonlocal state
        state += 1
        return state

    return count


def counting_on_itself() -> Any:
    def count() -> int:
        count.calls += 1  # type: ignore[attr-defined]
        return count.calls  # type: ignore[attr-defined]

    count.calls = 0  # type: ignore[attr-defined]
    return count


class Callable_:
    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> int:
        self.calls += 1
        return self.calls


@pytest.mark.parametrize(
    "make",
    [
        counting,
        counting_by_rebinding,
        counting_on_itself,
        lambda: Callable_().count,
        lambda: functools.partial(Callable_.count, Callable_()),
        lambda: functools.partial(counting()),
    ],
    ids=["closure", "rebound in a closure", "attribute of a function", "method", "partial of an object", "partial"],
)
def test_function_that_counts_goes_on_from_where_it_was(make):
    count = make()
    count()
    with preserved_object_state([{"collate_fn": count}]):
        count()
        count()
    assert count() == 2


# Random numbers, tensors, arrays


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: random.Random(3), lambda rng: rng.random()),
        (lambda: np.random.default_rng(3), lambda rng: rng.normal()),
        (lambda: np.random.RandomState(3), lambda rng: rng.normal()),
        (lambda: torch.Generator().manual_seed(3), lambda rng: float(torch.randn(1, generator=rng))),
    ],
    ids=["python", "numpy", "numpy's old one", "torch"],
)
def test_generator_goes_on_from_where_it_was(make, draw):
    rng, expected = make(), make()
    draw(rng), draw(expected)
    with preserved_object_state([Holder([rng])]):
        draw(rng)
    assert draw(rng) == draw(expected)


def test_generator_of_the_system_has_no_state_and_stops_nothing():
    holder = Holder([random.SystemRandom(), value := [1]])
    with preserved_object_state([holder]):
        value.append(2)
    assert value == [1]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_tensor_holds_the_same_values_in_the_same_memory(dtype, shape):
    tensor = torch.ones(shape, dtype=dtype)
    view, kept = tensor.view(-1), tensor.clone()
    with preserved_object_state([Holder(tensor)]):
        tensor.zero_()
    assert torch.equal(tensor, kept)
    assert torch.equal(view, kept.view(-1))


def test_parameter_holds_its_values_and_takes_gradients():
    parameter = torch.nn.Parameter(torch.ones(3))
    with preserved_object_state([[parameter]]), torch.no_grad():
        parameter.mul_(2)
    assert torch.equal(parameter, torch.ones(3))
    (parameter * 2).sum().backward()
    assert torch.equal(parameter.grad, torch.full((3,), 2.0))


def test_tensor_that_was_not_written_to_is_not_written_to():
    tensor = torch.tensor([float("nan"), -0.0])
    with preserved_object_state([[tensor]]):
        pass
    assert tensor._version == 0


def test_tensor_that_grew_inside_is_as_it_was_and_so_is_what_comes_after_it():
    bank, after = torch.ones(3), [1]
    with preserved_object_state([[bank, after]]):
        bank.data = torch.cat([bank, torch.zeros(2)])
        after.append(2)
    assert after == [1]
    assert torch.equal(bank, torch.ones(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.tensor([1 + 2j]).conj(),
        lambda: torch.empty(3, device="meta"),
    ],
    ids=["sparse", "csr", "conjugate", "meta"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_tensor_of_an_uncommon_kind_stops_nothing(make):
    tensor, value = make(), [1]
    with preserved_object_state([Holder([tensor, value])]):
        value.append(2)
    assert value == [1]


def test_array_holds_the_same_values_in_the_same_memory():
    array = np.arange(6.0).reshape(2, 3)
    view = array[0]
    with preserved_object_state([Holder(array)]):
        array += 1
    assert view.tolist() == [0, 1, 2]


def test_array_that_cannot_be_written_to_is_left():
    array = np.arange(3)
    array.flags.writeable = False
    with preserved_object_state([[array]]):
        pass
    assert array.tolist() == [0, 1, 2]


def test_what_is_larger_than_most_bytes_is_taken_to_be_data():
    small, large = torch.zeros(4), torch.zeros(5)
    small_array, large_array = np.zeros(2), np.zeros(3)
    with preserved_object_state([[small, large, small_array, large_array]], most_bytes=16):
        for value in (small, large, small_array, large_array):
            value.__iadd__(1)
    assert [float(value[0]) for value in (small, large, small_array, large_array)] == [0, 1, 0, 1]


# What is not followed


def test_what_is_to_be_left_is_not_looked_into():
    left, seen = Slotted([1]), Holder([1])
    with preserved_object_state([[left, seen]], leave=(Slotted,)):
        left.value.append(2)
        seen.value.append(2)
    assert (left.value, seen.value) == ([1, 2], [1])


def test_iterators_go_on():
    holder = Holder([itertools.count(), iter([1, 2]), (n for n in range(3))])
    with preserved_object_state([holder]):
        assert [next(iterator) for iterator in holder.value] == [0, 1, 0]
    assert [next(iterator) for iterator in holder.value] == [1, 2, 1]


def test_machinery_and_what_holds_it_goes_on():
    class Service:
        def __init__(self) -> None:
            self.lock, self.done = threading.Lock(), 0

    pending: queue.Queue[int] = queue.Queue()
    service = Service()
    with preserved_object_state([{"queue": pending, "service": service}]):
        pending.put(1)
        service.done = 1
        service.lock.acquire()
    assert pending.get_nowait() == 1
    assert service.done == 1
    assert service.lock.locked()


# Any nesting

leaves = st.one_of(st.integers(), st.text(max_size=2), st.none())
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=1), inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Holder, inner),
        st.builds(Slotted, inner),
    ),
    max_leaves=12,
)


def told(value: Any) -> Any:
    """Everything there is below a value, with the identity of whatever can be changed."""
    if isinstance(value, list | tuple):
        return (type(value), id(value) if isinstance(value, list) else 0, [told(member) for member in value])
    if isinstance(value, dict):
        return (dict, id(value), [(key, told(member)) for key, member in value.items()])
    if isinstance(value, Holder | Slotted):
        return (type(value), id(value), told(value.value))
    return value


def scramble(value: Any) -> None:
    if isinstance(value, list | tuple):
        for member in value:
            scramble(member)
        if isinstance(value, list):
            value.reverse()
            value.append("more")
    elif isinstance(value, dict):
        for member in list(value.values()):
            scramble(member)
        value.clear()
        value["more"] = 1
    elif isinstance(value, Holder | Slotted):
        scramble(value.value)
        value.value = "other"


@given(nested)
def test_any_nesting_is_as_it_was(value):
    before = told(value)
    with preserved_object_state([value]):
        scramble(value)
    assert told(value) == before
