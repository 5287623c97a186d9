"""The one grammar of selection: which BatchNorm layers a model has and which of them a pattern means."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from lightning_bn.functional import SelectionError as PublicSelectionError
from lightning_bn.functional import batch_norm_layers as public_batch_norm_layers
from lightning_bn.functional import restore_snapshot, take_snapshot
from lightning_bn.functional.layers.patterns import SelectionError
from lightning_bn.functional.layers.selection import batch_norm_layers, tracked_layers
from tests.models import (
    SMALL_RESNET_NAMES,
    BatchNormAct2d,
    Block,
    FrozenBatchNorm2d,
    Holder,
    SharedNorm,
    SmallResNet,
    images,
)

LAYER1 = [name for name in SMALL_RESNET_NAMES if name.startswith("layer1.")]


def selected(model: nn.Module, modules: object = None, exclude: object = None, root: str = "") -> list[str]:
    return list(batch_norm_layers(model, modules, exclude=exclude, root=root))  # type: ignore[arg-type]


def message_of(call: Callable[[], object], error: type[Exception] = SelectionError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


# --- which modules are BatchNorm ---------------------------------------------------------------------------------


def test_the_public_names_are_those_of_the_file() -> None:
    assert public_batch_norm_layers is batch_norm_layers
    assert PublicSelectionError is SelectionError
    assert issubclass(SelectionError, ValueError)


def test_every_layer_is_found_in_registration_order() -> None:
    assert selected(SmallResNet()) == SMALL_RESNET_NAMES


def test_the_values_are_the_models_own_modules() -> None:
    model = SmallResNet()
    for name, layer in batch_norm_layers(model).items():
        assert layer is model.get_submodule(name)


def test_order_is_of_registration_not_of_the_patterns() -> None:
    model = SmallResNet()
    assert selected(model, ["head", "layer2", "bn1"]) == ["bn1", "layer2.0.bn1", "layer2.0.bn2", "head.bn"]


def test_order_is_of_registration_not_of_the_alphabet() -> None:
    model = nn.Module()
    for name in ("zeta", "alpha", "mid"):
        model.add_module(name, nn.BatchNorm1d(2))
    assert selected(model) == ["zeta", "alpha", "mid"]


def test_a_layer_meant_by_several_patterns_is_listed_once() -> None:
    assert selected(SmallResNet(), ["layer1", "layer1.0", "**.bn1", "re:layer1.*"]).count("layer1.0.bn1") == 1


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3),
        nn.BatchNorm3d(3),
        nn.SyncBatchNorm(3),
        nn.LazyBatchNorm2d(),
        BatchNormAct2d(3),
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_kind_of_batch_norm_is_found(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Identity(), layer)
    assert batch_norm_layers(model) == {"1": layer}


def test_a_model_converted_to_sync_batch_norm_keeps_its_names() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(SmallResNet())
    layers = batch_norm_layers(model)
    assert list(layers) == SMALL_RESNET_NAMES
    assert all(isinstance(layer, nn.SyncBatchNorm) for layer in layers.values())


def test_a_bare_layer_is_a_model() -> None:
    layer = nn.BatchNorm2d(3)
    assert list(batch_norm_layers(layer).values()) == [layer]


@pytest.mark.parametrize(
    "other",
    [nn.InstanceNorm2d(3, track_running_stats=True), FrozenBatchNorm2d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3)],
    ids=lambda layer: type(layer).__name__,
)
def test_other_normalization_is_not_found(other: nn.Module) -> None:
    assert selected(nn.Sequential(nn.BatchNorm2d(3), other)) == ["0"]


# --- paths -------------------------------------------------------------------------------------------------------


def test_a_path_selects_everything_below_it() -> None:
    assert selected(SmallResNet(), "layer1") == LAYER1


def test_a_path_is_whole_components() -> None:
    model = SmallResNet()
    assert not {"layer10.0.bn1", "layer10.0.bn2"} & set(selected(model, "layer1"))
    assert selected(model, "layer10") == ["layer10.0.bn1", "layer10.0.bn2"]


def test_a_path_selects_the_layer_of_that_name() -> None:
    assert selected(SmallResNet(), "layer1.0.bn2") == ["layer1.0.bn2"]


def test_a_path_starts_at_the_top() -> None:
    assert selected(SmallResNet(), "bn1") == ["bn1"]


def test_a_string_and_a_list_of_one_mean_the_same() -> None:
    assert selected(SmallResNet(), "layer2") == selected(SmallResNet(), ["layer2"])


@pytest.mark.parametrize("part", ["layer", "layer1.0.bn", "ayer1", "layer1.0.bn1.weight"])
def test_a_part_of_a_component_selects_nothing(part: str) -> None:
    with pytest.raises(SelectionError, match=re.escape(part)):
        selected(SmallResNet(), part)


def test_the_dot_of_a_path_is_no_wildcard() -> None:
    model = nn.Module()
    model.add_module("axb", nn.BatchNorm1d(2))
    with pytest.raises(SelectionError):
        selected(model, "a.b")


# --- globs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", SMALL_RESNET_NAMES),
        ("**", SMALL_RESNET_NAMES),
        ("layer*", [name for name in SMALL_RESNET_NAMES if name.startswith("layer")]),
        ("layer?", [*LAYER1, "layer2.0.bn1", "layer2.0.bn2"]),
        ("layer[2-9]", ["layer2.0.bn1", "layer2.0.bn2"]),
        ("layer[!1]", ["layer2.0.bn1", "layer2.0.bn2"]),
        ("layer1.*", LAYER1),
        ("layer1.*.bn1", ["layer1.0.bn1", "layer1.1.bn1"]),
        ("layer1.**", LAYER1),
        ("layer1.**.bn1", ["layer1.0.bn1", "layer1.1.bn1"]),
        ("layer1.0.**.bn1", ["layer1.0.bn1"]),
        ("*.bn", ["head.bn"]),
        ("*.*.bn2", ["layer1.0.bn2", "layer1.1.bn2", "layer2.0.bn2", "layer10.0.bn2"]),
        ("**.bn1", ["bn1", "layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1", "layer10.0.bn1"]),
        ("**.0.bn?", [name for name in SMALL_RESNET_NAMES if ".0." in name]),
        ("layer1.**.**.bn1", ["layer1.0.bn1", "layer1.1.bn1"]),
    ],
)
def test_a_glob_matches_components(pattern: str, expected: list[str]) -> None:
    assert selected(SmallResNet(), pattern) == expected


def test_one_star_stays_inside_one_component() -> None:
    with pytest.raises(SelectionError):
        selected(SmallResNet(), "*.bn1")  # bn1 lies at depths 1 and 3, never at 2


def test_a_glob_of_a_container_selects_everything_below() -> None:
    assert selected(SmallResNet(), "la*1.1") == ["layer1.1.bn1", "layer1.1.bn2"]


def test_the_rest_of_a_glob_is_literal() -> None:
    model = nn.Module()
    model.add_module("a+b", nn.BatchNorm1d(2))
    model.add_module("aab", nn.BatchNorm1d(2))
    assert selected(model, "a+*") == ["a+b"]


def test_a_glob_minds_the_case() -> None:
    model = nn.Module()
    model.add_module("Stem", nn.BatchNorm1d(2))
    model.add_module("stem", nn.BatchNorm1d(2))
    assert selected(model, "s*") == ["stem"]


# --- regular expressions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"re:layer1\..*", LAYER1),
        (r"re:.*\.bn2", ["layer1.0.bn2", "layer1.1.bn2", "layer2.0.bn2", "layer10.0.bn2"]),
        (r"re:layer\d+\.0\.bn1", ["layer1.0.bn1", "layer2.0.bn1", "layer10.0.bn1"]),
        (r"re:bn1|head\.bn", ["bn1", "head.bn"]),
        (r"re:(?!layer).*", ["bn1", "head.bn"]),
    ],
)
def test_a_regular_expression_matches_the_full_name(pattern: str, expected: list[str]) -> None:
    assert selected(SmallResNet(), pattern) == expected


@pytest.mark.parametrize("pattern", ["re:layer1", "re:bn2", "re:layer1.0", r"re:head\.b"])
def test_a_regular_expression_that_matches_part_of_a_name_selects_nothing(pattern: str) -> None:
    with pytest.raises(SelectionError):
        selected(SmallResNet(), pattern)


def test_a_regular_expression_is_relative_to_the_root() -> None:
    model = Holder(SmallResNet())
    assert selected(model, "re:bn1", root="model") == ["model.bn1"]
    assert selected(model, r"re:layer2\..*", root="model") == ["model.layer2.0.bn1", "model.layer2.0.bn2"]
    with pytest.raises(SelectionError):
        selected(model, r"re:model\.bn1", root="model")


def test_an_alternative_in_a_regular_expression_does_not_escape_the_root() -> None:
    model = nn.ModuleDict({"model": SmallResNet(), "bn1": nn.BatchNorm1d(2)})
    assert selected(model, "re:bn1|bn1", root="model") == ["model.bn1"]


def test_an_invalid_regular_expression_is_an_error_that_shows_it() -> None:
    text = message_of(lambda: selected(SmallResNet(), "re:layer1(["))
    assert "layer1([" in text


# --- exclude -----------------------------------------------------------------------------------------------------


def test_exclude_takes_away_from_what_is_selected() -> None:
    assert selected(SmallResNet(), "layer1", "layer1.0") == ["layer1.1.bn1", "layer1.1.bn2"]
    assert selected(SmallResNet(), None, ["layer*", "head"]) == ["bn1"]
    assert selected(SmallResNet(), "layer1", "re:.*bn2") == ["layer1.0.bn1", "layer1.1.bn1"]


def test_exclude_is_whole_components_too() -> None:
    assert "layer10.0.bn1" in selected(SmallResNet(), None, "layer1")


def test_exclude_may_name_layers_that_were_not_selected() -> None:
    assert selected(SmallResNet(), "layer1", "head") == LAYER1


def test_an_exclude_that_matches_nothing_is_an_error() -> None:
    text = message_of(lambda: selected(SmallResNet(), "layer1", "layr2"))
    assert "layr2" in text
    assert "layer2" in text


def test_excluding_everything_is_an_error() -> None:
    assert "exclu" in message_of(lambda: selected(SmallResNet(), "layer1", "layer1")).lower()
    assert "exclu" in message_of(lambda: selected(SmallResNet(), None, "**")).lower()


# --- root --------------------------------------------------------------------------------------------------------


def test_root_is_put_before_every_path() -> None:
    model = Holder(SmallResNet())
    assert selected(model, "layer2", root="model") == ["model.layer2.0.bn1", "model.layer2.0.bn2"]
    assert selected(model, "layer1", "layer1.0", root="model") == ["model.layer1.1.bn1", "model.layer1.1.bn2"]
    assert selected(model, "*.bn", root="model") == ["model.head.bn"]


def test_without_patterns_everything_below_the_root_is_selected() -> None:
    model = nn.ModuleDict({"model": SmallResNet(), "model2": nn.BatchNorm1d(3), "critic": nn.BatchNorm1d(3)})
    assert selected(model, root="model") == [f"model.{name}" for name in SMALL_RESNET_NAMES]
    assert selected(model, root="model.layer10") == ["model.layer10.0.bn1", "model.layer10.0.bn2"]


def test_a_glob_below_a_root_stays_below_it() -> None:
    model = nn.ModuleDict({"model": SmallResNet(), "other": SmallResNet()})
    assert all(name.startswith("model.") for name in selected(model, "**.bn1", root="model"))


@pytest.mark.parametrize("root", ["net", "mod", "model.layer7"])
def test_a_root_that_does_not_exist_is_an_error_that_names_it(root: str) -> None:
    assert root in message_of(lambda: selected(Holder(SmallResNet()), "layer1", root=root))
    assert root in message_of(lambda: selected(Holder(SmallResNet()), root=root))


def test_a_root_without_batch_norm_is_an_error() -> None:
    assert "model.conv1" in message_of(lambda: selected(Holder(SmallResNet()), root="model.conv1"))


@pytest.mark.parametrize("pattern", ["layer1", "layer1.0", "layer*.0", "head.bn"])
@pytest.mark.parametrize("argument", ["modules", "exclude"])
def test_the_root_that_would_have_helped_is_proposed(pattern: str, argument: str) -> None:
    text = message_of(lambda: batch_norm_layers(Holder(SmallResNet()), **{argument: pattern}))  # type: ignore[arg-type]
    assert re.search(r"""root\s*=\s*["'`]model["'`]""", text), text


def test_a_nested_root_is_proposed_as_well() -> None:
    text = message_of(lambda: selected(Holder(Holder(SmallResNet())), "layer1"))
    assert re.search(r"""root\s*=\s*["'`]model\.model["'`]""", text), text


def test_dropping_the_root_is_proposed_where_that_would_have_helped() -> None:
    text = message_of(lambda: selected(Holder(SmallResNet()), "model.layer1", root="model"))
    assert re.search(r"""root\s*=\s*(""|''|``)|without .*root""", text), text


def test_no_root_is_proposed_where_none_would_help() -> None:
    assert not re.search(r"""root\s*=\s*["'`]""", message_of(lambda: selected(SmallResNet(), "encoder")))


# --- layers under two names --------------------------------------------------------------------------------------


def test_a_shared_layer_is_listed_once_under_its_first_name() -> None:
    assert selected(SharedNorm()) == ["first.norm", "own"]


@pytest.mark.parametrize("pattern", ["first", "second", "second.norm", "re:second.*", "sec*"])
def test_a_shared_layer_is_selected_by_any_of_its_names(pattern: str) -> None:
    assert selected(SharedNorm(), pattern) == ["first.norm"]


@pytest.mark.parametrize("pattern", ["first", "second", "second.norm", r"re:second\.norm"])
def test_a_shared_layer_is_excluded_by_any_of_its_names(pattern: str) -> None:
    assert selected(SharedNorm(), None, pattern) == ["own"]
    assert selected(SharedNorm(), ["first", "own"], pattern) == ["own"]


def test_a_layer_of_a_shared_container_is_selected_by_any_path_to_it() -> None:
    block = Block(3)
    model = nn.ModuleDict({"student": block, "alias": nn.Sequential(block)})
    assert selected(model) == ["student.bn1", "student.bn2"]
    assert selected(model, "alias.0.bn2") == ["student.bn2"]
    assert selected(model, None, "alias.0.bn2") == ["student.bn1"]


def test_a_shared_layer_that_lies_below_the_root_under_its_second_name_is_selected() -> None:
    layers = batch_norm_layers(SharedNorm(), root="second")
    assert len(layers) == 1


# --- wrappers ----------------------------------------------------------------------------------------------------


def test_a_compiled_model_keeps_its_names() -> None:
    model = torch.compile(SmallResNet(), backend="eager")
    assert selected(model) == SMALL_RESNET_NAMES  # type: ignore[arg-type]
    assert selected(model, "layer1") == LAYER1  # type: ignore[arg-type]


def test_compiled_submodules_keep_their_names() -> None:
    model = SmallResNet()
    plain = dict(model.named_modules())
    model.layer1 = torch.compile(model.layer1, backend="eager")  # type: ignore[assignment]
    model.head.bn = torch.compile(model.head.bn, backend="eager")  # type: ignore[assignment]
    assert any("_orig_mod" in name for name, _ in model.named_modules())
    layers = batch_norm_layers(model)
    assert list(layers) == SMALL_RESNET_NAMES
    assert all(layers[name] is plain[name] for name in layers)
    assert selected(model, ["layer1.*.bn1", "head.bn"]) == ["layer1.0.bn1", "layer1.1.bn1", "head.bn"]


def test_a_compiled_copy_beside_the_original_is_a_shared_layer() -> None:
    model = Holder(SmallResNet())
    model.fast = torch.compile(model.model, backend="eager")
    assert selected(model) == [f"model.{name}" for name in SMALL_RESNET_NAMES]
    assert selected(model, "fast.layer2") == ["model.layer2.0.bn1", "model.layer2.0.bn2"]


def test_checkpoint_wrappers_leave_no_trace_in_the_names() -> None:
    model = SmallResNet()
    model.layer1[0] = checkpoint_wrapper(model.layer1[0])
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_modules())
    assert selected(model) == SMALL_RESNET_NAMES


def test_data_parallel_leaves_no_trace_in_the_names() -> None:
    model = nn.DataParallel(SmallResNet())
    assert selected(model) == SMALL_RESNET_NAMES
    assert selected(model, "layer1") == LAYER1
    assert selected(Holder(model), "layer1", root="model") == [f"model.{name}" for name in LAYER1]


def test_wrappers_inside_wrappers_leave_no_trace_in_the_names() -> None:
    model = torch.compile(nn.DataParallel(torch.compile(SmallResNet(), backend="eager")), backend="eager")
    assert selected(model) == SMALL_RESNET_NAMES  # type: ignore[arg-type]


def test_a_child_that_is_called_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": Block(3)})
    assert selected(model) == ["module.bn1", "module.bn2"]
    assert selected(nn.DataParallel(model)) == ["module.bn1", "module.bn2"]
    assert selected(nn.DataParallel(model), "module.bn2") == ["module.bn2"]


class ModelEma(nn.Module):
    """Keeps averages as well-known libraries do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)


@pytest.mark.parametrize("wrap", [AveragedModel, ModelEma, Fabric(accelerator="cpu", devices=1).setup_module])
def test_averages_and_fabric_leave_no_trace_in_the_names(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = SmallResNet()
    wrapped = wrap(model)
    assert selected(wrapped) == SMALL_RESNET_NAMES
    assert selected(wrapped, "layer1") == selected(model, "layer1")
    restore_snapshot(wrapped, take_snapshot(model))


def test_averages_of_a_wrapped_model_leave_no_trace_in_the_names() -> None:
    assert selected(AveragedModel(nn.DataParallel(SmallResNet()))) == SMALL_RESNET_NAMES


@pytest.mark.parametrize("name", ["a-b*[c]", "what?", "[x]", "**"])
def test_a_name_with_the_characters_of_a_glob_means_itself(name: str) -> None:
    model = nn.ModuleDict({name: Block(3), "a-bxc": Block(3)})
    assert [f"{name}.bn1", f"{name}.bn2"] == selected(model, name)[:2]
    assert selected(nn.ModuleDict({"net": model}), f"net.{name}.bn2")[0] == f"net.{name}.bn2"
    assert selected(nn.ModuleDict({"net": model}), f"{name}.bn2", root="net")[0] == f"net.{name}.bn2"


# --- errors ------------------------------------------------------------------------------------------------------


def test_what_matches_nothing_is_an_error_with_the_closest_names_and_their_counts() -> None:
    text = message_of(lambda: selected(SmallResNet(), "layr1"))
    assert "layr1" in text
    assert re.search(r"layer1['\"`]?\b[^0-9]*4\b", text), text


def test_an_error_in_a_later_component_proposes_names_at_that_depth() -> None:
    text = message_of(lambda: selected(SmallResNet(), "layer1.1.bn9"))
    assert re.search(r"layer1\.1\.bn[12]", text), text


def test_one_pattern_of_a_list_that_matches_nothing_is_an_error() -> None:
    text = message_of(lambda: selected(SmallResNet(), ["layer1", "laier2"]))
    assert "laier2" in text
    assert re.search(r"layer2['\"`]?\b[^0-9]*2\b", text), text


def test_a_path_without_batch_norm_below_is_said_to_exist() -> None:
    text = message_of(lambda: selected(SmallResNet(), "head.fc"))
    assert "head.fc" in text
    assert re.search(r"(?i)no batch_?norm", text), text


def test_a_glob_that_matches_nothing_is_an_error_that_shows_it() -> None:
    assert "stage*" in message_of(lambda: selected(SmallResNet(), "stage*"))


def test_a_model_without_batch_norm_is_an_error_with_its_other_normalization_layers() -> None:
    model = nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.LayerNorm(3), nn.InstanceNorm2d(3))
    for modules in (None, "0"):
        text = message_of(lambda: selected(model, modules))  # noqa: B023
        assert "GroupNorm" in text
        assert "LayerNorm" in text
        assert "InstanceNorm2d" in text


def test_a_model_without_any_normalization_is_an_error() -> None:
    assert "BatchNorm" in message_of(lambda: selected(nn.Linear(2, 2)))


@pytest.mark.parametrize("modules", ["", [], [""], ["layer1", ""], "re:"])
def test_empty_patterns_and_lists_are_errors(modules: object) -> None:
    with pytest.raises(SelectionError):
        selected(SmallResNet(), modules)


@pytest.mark.parametrize("exclude", ["", [""]])
def test_empty_exclude_patterns_are_errors(exclude: object) -> None:
    with pytest.raises(SelectionError):
        selected(SmallResNet(), None, exclude)


@pytest.mark.parametrize("wrong", [3, [3], {"layer1": True}, nn.BatchNorm1d(2), ["layer1", None]], ids=repr)
@pytest.mark.parametrize("argument", ["modules", "exclude"])
def test_patterns_of_another_type_are_type_errors(wrong: object, argument: str) -> None:
    with pytest.raises(TypeError):
        batch_norm_layers(SmallResNet(), **{argument: wrong})  # type: ignore[arg-type]


def test_selecting_changes_nothing_in_the_model() -> None:
    model = SmallResNet().eval()
    model.layer1.train()
    before = {name: (module.training, id(module)) for name, module in model.named_modules()}
    selected(model, "layer1", "layer1.0")
    assert before == {name: (module.training, id(module)) for name, module in model.named_modules()}


# --- tracked_layers ----------------------------------------------------------------------------------------------


class OneTracked(nn.Module):
    """One layer with and one without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.BatchNorm2d(3)
        self.untracked = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.untracked(self.kept(x))


def test_tracked_layers_of_an_ordinary_model_are_all_its_layers() -> None:
    model = SmallResNet()
    assert tracked_layers(model) == batch_norm_layers(model)
    assert list(tracked_layers(model, "layer1", exclude="layer1.0")) == ["layer1.1.bn1", "layer1.1.bn2"]
    assert list(tracked_layers(Holder(model), "layer2", root="model")) == ["model.layer2.0.bn1", "model.layer2.0.bn2"]


def test_layers_without_running_statistics_are_left_out_where_nothing_was_named() -> None:
    assert list(tracked_layers(OneTracked())) == ["kept"]


@pytest.mark.parametrize("modules", ["untracked", ["kept", "untracked"], "**"])
def test_a_named_layer_without_running_statistics_is_an_error_that_names_it(modules: object) -> None:
    text = message_of(lambda: tracked_layers(OneTracked(), modules))  # type: ignore[arg-type]
    assert "untracked" in text


def test_a_named_layer_without_running_statistics_may_be_excluded() -> None:
    assert list(tracked_layers(OneTracked(), "**", exclude="untracked")) == ["kept"]


def test_a_model_in_which_no_layer_has_running_statistics_is_an_error() -> None:
    with pytest.raises(SelectionError):
        tracked_layers(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))


def test_running_statistics_are_a_matter_of_buffers_not_of_the_flag() -> None:
    switched_off = nn.BatchNorm2d(3)
    switched_off.track_running_stats = False
    switched_on = nn.BatchNorm2d(3, track_running_stats=False)
    switched_on.track_running_stats = True
    assert list(tracked_layers(nn.Sequential(switched_off, switched_on))) == ["0"]


@pytest.mark.parametrize("modules", [None, "lazy"])
def test_an_uninitialized_lazy_layer_is_an_error_that_names_it(modules: str | None) -> None:
    model = nn.ModuleDict({"lazy": nn.LazyBatchNorm2d(), "plain": nn.BatchNorm2d(3)})
    assert "lazy" in message_of(lambda: tracked_layers(model, modules))


def test_a_lazy_layer_is_tracked_after_its_first_forward() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(images())
    assert list(tracked_layers(model)) == ["0"]


def test_an_unmatched_pattern_is_an_error_here_as_well() -> None:
    assert "layr1" in message_of(lambda: tracked_layers(SmallResNet(), "layr1"))
