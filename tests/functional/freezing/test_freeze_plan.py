"""What a freeze will do, told before it does anything."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_bn.functional import FreezeSchedule, SelectionError, freeze_batch_norm, plan
from lightning_bn.functional.freezing.freeze_selection import FreezeSelection
from tests.models import SMALL_RESNET_NAMES, Holder, SharedNorm, SmallResNet, fill_statistics, seeded, state_bits

PATTERNS = ["layer1", "layer10", "layer2.0", "**.bn1", "re:.*bn2", "head", "layer1.?.bn1"]
NAMES = tuple(SMALL_RESNET_NAMES)
NET = fill_statistics(seeded(SmallResNet))


def test_every_layer_is_listed_and_those_that_no_rule_touches_are_marked() -> None:
    made = plan(NET, ["layer1", "head"], exclude="layer1.0")
    assert tuple(layer.name for layer in made.layers) == NAMES
    assert {layer.name: layer.rule for layer in made.frozen} == {
        "layer1.1.bn1": "layer1",
        "layer1.1.bn2": "layer1",
        "head.bn": "head",
    }
    assert all(layer.stats and layer.affine and layer.tasks == () for layer in made.frozen)
    assert not any(layer.stats or layer.affine for layer in made.layers if not layer.frozen)
    assert {layer.kind for layer in made.layers} == {"BatchNorm2d", "BatchNorm1d"}


@settings(max_examples=40)
@given(
    modules=st.none() | st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3, unique=True),
    exclude=st.none() | st.sampled_from(PATTERNS),
    stats=st.booleans(),
    affine=st.booleans(),
)
def test_what_is_planned_is_what_freezing_does(
    modules: list[str] | None, exclude: str | None, stats: bool, affine: bool
) -> None:
    net = seeded(SmallResNet)
    fill_statistics(net)
    try:
        made = plan(net, modules, exclude=exclude, stats=stats, affine=affine)
    except ValueError as error:
        with pytest.raises(type(error)):
            freeze_batch_norm(net, modules, exclude=exclude, stats=stats, affine=affine)
        return
    frozen = freeze_batch_norm(net, modules, exclude=exclude, stats=stats, affine=affine)
    assert tuple(layer.name for layer in made.frozen) == frozen
    layers = dict(net.named_modules())
    for layer in made.layers:
        assert layer.stats == (not layers[layer.name].training)
        assert layer.affine == (not layers[layer.name].weight.requires_grad)  # type: ignore[union-attr]


def test_planning_changes_nothing() -> None:
    net = fill_statistics(seeded(SmallResNet))
    before, attributes = state_bits(net), {name: set(vars(module)) for name, module in net.named_modules()}
    plan(net, "layer1", by_task={"det": ["head"]})
    assert state_bits(net) == before
    assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_rule_is_the_first_pattern_that_means_the_layer_as_it_was_written() -> None:
    made = plan(Holder(NET), ["**.bn2", "layer1"], root="model")
    rules = {layer.name: layer.rule for layer in made.frozen}
    assert rules["model.layer1.0.bn2"] == "**.bn2"
    assert rules["model.layer1.0.bn1"] == "layer1"


@pytest.mark.parametrize(("root", "rule"), [("", "every layer"), ("layer1", "layer1")])
def test_without_modules_the_rule_is_the_root_or_every_layer(root: str, rule: str) -> None:
    assert {layer.rule for layer in plan(NET, root=root).frozen} == {rule}


def test_a_shared_layer_has_the_rule_that_means_it_under_any_of_its_names() -> None:
    made = plan(fill_statistics(seeded(SharedNorm)), "second.norm")
    assert [(layer.name, layer.rule) for layer in made.frozen] == [("first.norm", "second.norm")]


def test_other_weights_below_the_paths_that_still_train_are_counted() -> None:
    net = fill_statistics(seeded(SmallResNet))
    assert plan(net, "layer1").others == 4  # four convolutions without bias
    assert plan(net, "head").others == 4  # two linear layers with bias
    assert plan(net, "head.bn").others == 0
    assert plan(net, "head", affine=False).others == 6
    assert plan(net, ["layer1", "layer1.0", "head"]).others == 8
    assert plan(net, "layer1", exclude="layer1.0.bn1").others == 6
    net.head.requires_grad_(False)
    assert plan(net, "head").others == 0


def test_a_layer_without_affine_is_not_said_to_have_it_frozen() -> None:
    net = fill_statistics(nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3)))
    assert [(layer.stats, layer.affine) for layer in plan(net).layers] == [(True, False), (True, True)]


def test_a_layer_without_running_statistics_is_planned_for_affine_alone() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(SelectionError, match="'0'"):
        plan(net)
    (layer,) = plan(net, stats=False).layers
    assert (layer.stats, layer.affine) == (False, True)


# by task


def test_layers_of_a_task_are_those_beside_what_is_frozen_always() -> None:
    selection = FreezeSelection(
        ["layer1"], by_task={"det": ["layer1.0", "head"], "seg": "layer10", "depth": ["layer1"]}
    )
    always, tasks = selection.layers(NET)
    assert tuple(always) == NAMES[1:5]
    assert {task: tuple(layers) for task, layers in tasks.items()} == {
        "det": ("head.bn",),
        "seg": ("layer10.0.bn1", "layer10.0.bn2"),
        "depth": (),
    }


def test_without_modules_nothing_is_frozen_beside_the_tasks() -> None:
    made = plan(NET, by_task={"det": ["head"], "seg": ["head", "bn1"]}, affine=False)
    assert {layer.name: (layer.rule, layer.tasks, layer.stats, layer.affine) for layer in made.frozen} == {
        "bn1": ("bn1", ("seg",), True, False),
        "head.bn": ("head", ("det", "seg"), True, False),
    }
    assert made.others == 8  # those of the layers themselves among them


def test_exclude_and_root_hold_for_the_tasks_too() -> None:
    made = plan(Holder(NET), exclude="layer1.0", root="model", by_task={"det": ["layer1"]})
    assert [layer.name for layer in made.frozen] == ["model.layer1.1.bn1", "model.layer1.1.bn2"]


def test_a_single_path_for_a_task_may_be_a_string() -> None:
    made = plan(NET, by_task={"det": "head"})
    assert [(layer.name, layer.rule) for layer in made.frozen] == [("head.bn", "head")]
    assert made.others == 4


def test_a_task_whose_path_means_nothing_is_an_error() -> None:
    with pytest.raises(SelectionError, match=r"'hed'.*'head'"):
        plan(NET, by_task={"det": ["hed"]})


def test_nothing_to_freeze_is_an_error() -> None:
    with pytest.raises(ValueError, match="freezes nothing"):
        plan(NET, stats=False, affine=False)


# as text


def test_it_reads_as_one_line() -> None:
    assert str(plan(NET, ["layer1", "head"])) == (
        "5 of 10 layers frozen (statistics, affine) by layer1: 4, head: 1; "
        "8 other weights below these paths still train"
    )
    assert str(plan(NET, "head.bn", stats=False)) == "1 of 10 layers frozen (affine) by head.bn: 1"
    late = plan(NET, "head.bn", schedule=FreezeSchedule(start_epoch=-20))
    assert str(late) == "1 of 10 layers frozen from epoch -20 (statistics, affine) by head.bn: 1"


@pytest.mark.parametrize("by_task", [None, {"det": ["head"]}])
@pytest.mark.parametrize(("stats", "affine"), [(True, True), (True, False), (False, True)])
def test_its_text_counts_what_its_layers_say(stats: bool, affine: bool, by_task: dict[str, list[str]] | None) -> None:
    made = plan(NET, "layer1", stats=stats, affine=affine, by_task=by_task)
    assert str(made).startswith(f"{len(made.frozen)} of 10 layers frozen")
    assert ("statistics" in str(made)) == stats
    assert ("affine" in str(made)) == affine
