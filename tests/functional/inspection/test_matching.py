"""Names of two files are matched in the way that pairs most layers and leaves out least."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_bn.functional.inspection.matching import match

NAMES = ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1", "head.bn"]


@pytest.mark.parametrize(
    ("one", "other", "pairs"),
    [
        (NAMES, NAMES, 5),
        (NAMES, [f"model.{name}" for name in NAMES], 5),
        ([f"net.encoder.{name}" for name in NAMES], [f"backbone.{name}" for name in NAMES], 5),
        (NAMES, NAMES[1:3], 2),
        (NAMES, ["decoder.norm"], 0),
        (["layer1.bn", "layer2.bn"], ["layer2.bn", "layer3.bn"], 1),
        ([""], [""], 1),
    ],
)
def test_as_many_are_paired_as_can_be(one, other, pairs):
    found = match(one, other)
    assert len(found.pairs) == pairs
    assert len(found.only_first) == len(one) - pairs
    assert len(found.only_second) == len(other) - pairs


def test_the_same_name_goes_before_one_without_a_prefix():
    found = match(["bn", "ema.bn"], ["bn", "ema.bn"])
    assert found.pairs == {"bn": ("bn", "bn"), "ema.bn": ("ema.bn", "ema.bn")}
    assert found.assumed == ()


def test_names_that_become_one_without_wrappers_stay_as_they_are():
    names = ["a.bn", "a.module.bn"]
    assert set(match(names, names).pairs) == set(names)


COMPONENTS = st.sampled_from(["a", "b", "0", "1", "module", "_orig_mod"])
PATHS = st.lists(st.lists(COMPONENTS, min_size=1, max_size=4).map(".".join), unique=True, min_size=1, max_size=6)


@given(PATHS, PATHS)
def test_every_name_is_paired_once_or_listed(one, other):
    found = match(one, other)
    firsts, seconds = [pair[0] for pair in found.pairs.values()], [pair[1] for pair in found.pairs.values()]
    assert sorted([*firsts, *found.only_first]) == sorted(one)
    assert sorted([*seconds, *found.only_second]) == sorted(other)
    turned = match(other, one)
    assert len(turned.pairs) == len(found.pairs)


@given(PATHS)
def test_names_are_matched_with_themselves(names):
    found = match(names, names)
    assert sorted(found.pairs.values()) == [(name, name) for name in sorted(names)]
