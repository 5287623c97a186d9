"""A checkpoint in hand gets population statistics; everything else in it is what it was."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_bn import BatchNormFreezer
from lightning_bn.functional import (
    RecalibrationError,
    SelectionError,
    recalibrate,
    recalibrate_checkpoint,
    take_snapshot,
    task_statistics,
)
from lightning_bn.functional.layers.status import status_by_name
from lightning_bn.functional.statistics.recalibration_record import KEY
from tests.averages import EMAWeightAveraging
from tests.callbacks.fits import LAYERS, Classifier, Net, quiet, samples, train_loader, val_loader
from tests.checkpoints import differences, read, without_record
from tests.models import SharedNorm, SmallResNet, bits, fill_statistics, images, seeded, state_bits
from tests.oracle import assert_all_statistics, layer_inputs

# A resumed run keeps its checkpoints elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

NORMS = [name.removeprefix("net.") for name in LAYERS]
STATISTICS = tuple(f"{name}.{key}" for name in LAYERS for key in ("running_mean", "running_var"))


class WithHyperparameters(Classifier):
    def __init__(self, lr: float = 0.1, names: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()


def batches() -> list[Tensor]:
    return [batch[0] for batch in train_loader(samples(40, seed=5), shuffle=False)]


def fit(folder: Path, *callbacks: pl.Callback, ckpt_path: Path | None = None, **settings: Any) -> pl.Trainer:
    pl.seed_everything(3, verbose=False)
    saver = ModelCheckpoint(dirpath=folder, save_last=True, save_top_k=-1, filename="{epoch}")
    kwargs = {"enable_checkpointing": True, "num_sanity_val_steps": 0, "max_epochs": 1, **settings}
    trainer = quiet(callbacks=[saver, *callbacks], **kwargs)
    trainer.fit(WithHyperparameters(), train_loader(), val_loader(), ckpt_path=ckpt_path)
    return trainer


def ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.9)


@pytest.fixture(scope="module")
def lightning_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    fit(folder)
    return folder / "last.ckpt"


@pytest.fixture(scope="module")
def averaged_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    fit(folder, ema())
    return folder / "last.ckpt"


def assert_precise(state: dict[str, Tensor], prefix: str = "net.") -> None:
    net = Net()
    net.load_state_dict({name.removeprefix(prefix): value for name, value in state.items()})
    assert_all_statistics(net, layer_inputs(net, batches(), NORMS))


def as_trained(path: Path, tmp_path: Path, *callbacks: pl.Callback) -> None:
    """The checkpoint can be resumed from, to the same step and with the weights that it holds."""
    before = read(path)
    trainer = fit(tmp_path / "resumed", *callbacks, ckpt_path=path, max_epochs=2)
    assert trainer.global_step == 2 * before["global_step"]
    assert (tmp_path / "resumed" / "last.ckpt").exists()


# Lightning's checkpoints


def test_network_of_a_lightning_checkpoint_gets_the_statistics_of_the_batches(lightning_checkpoint, tmp_path):
    done = recalibrate_checkpoint(lightning_checkpoint, Net(), batches(), tmp_path / "new.ckpt", prefix="net.")
    assert_precise(read(tmp_path / "new.ckpt")["state_dict"])
    assert (done.path, done.averaged) == (tmp_path / "new.ckpt", False)
    assert done.recalibration.num_samples == 40
    assert "weights as saved" in str(done)


def test_lightning_module_itself_takes_the_weights(lightning_checkpoint, tmp_path):
    module = Classifier()
    done = recalibrate_checkpoint(lightning_checkpoint, module, batches(), tmp_path / "new.ckpt")
    saved = read(tmp_path / "new.ckpt")["state_dict"]
    assert_precise(saved)
    assert done.recalibration.layers == LAYERS
    assert {name: bits(value) for name, value in saved.items()} == state_bits(module)


@pytest.mark.parametrize(("build", "prefix"), [(Net, "net."), (Classifier, "")])
def test_nothing_but_running_statistics_differs_in_a_lightning_checkpoint(
    lightning_checkpoint, tmp_path, build, prefix
):
    recalibrate_checkpoint(lightning_checkpoint, build(), batches(), tmp_path / "new.ckpt", prefix=prefix)
    old, new = read(lightning_checkpoint), read(tmp_path / "new.ckpt")
    assert {"optimizer_states", "loops", "callbacks", "hyper_parameters"} <= set(old)
    assert list(new) == [*old, KEY]
    changed = [f"/state_dict/{name}" for name in old["state_dict"] if name in STATISTICS]
    assert differences(old, without_record(new)) == changed


def test_file_that_was_read_is_left_as_it_was(lightning_checkpoint, tmp_path):
    before = lightning_checkpoint.read_bytes()
    recalibrate_checkpoint(lightning_checkpoint, Net(), batches(), tmp_path / "new.ckpt", prefix="net.")
    assert lightning_checkpoint.read_bytes() == before


def test_trainer_resumes_from_it(lightning_checkpoint, tmp_path):
    recalibrate_checkpoint(lightning_checkpoint, Net(), batches(), tmp_path / "new.ckpt", prefix="net.")
    as_trained(tmp_path / "new.ckpt", tmp_path)


def test_validation_from_it_sees_the_precise_statistics(lightning_checkpoint, tmp_path):
    recalibrate_checkpoint(lightning_checkpoint, Net(), batches(), tmp_path / "new.ckpt", prefix="net.")
    module = Classifier()
    quiet().validate(module, val_loader(), ckpt_path=tmp_path / "new.ckpt", verbose=False)
    assert_precise(module.state_dict())


# Averaged weights


def test_averages_are_what_is_recalibrated_and_that_is_said(averaged_checkpoint, tmp_path):
    done = recalibrate_checkpoint(averaged_checkpoint, Net(), batches(), tmp_path / "new.ckpt", prefix="net.")
    assert done.averaged
    assert "averaged weights" in str(done)
    old, new = read(averaged_checkpoint), read(tmp_path / "new.ckpt")
    assert bits(old["state_dict"]["net.bn.weight"]) != bits(old["current_model_state"]["net.bn.weight"])
    assert_precise(new["state_dict"])
    assert list(new) == [*old, KEY]
    changed = [f"/state_dict/{name}" for name in old["state_dict"] if name in STATISTICS]
    assert differences(old, without_record(new)) == changed


def test_averaging_resumes_from_it(averaged_checkpoint, tmp_path):
    recalibrate_checkpoint(averaged_checkpoint, Net(), batches(), tmp_path / "new.ckpt", prefix="net.")
    as_trained(tmp_path / "new.ckpt", tmp_path, ema())


def test_resumed_training_is_the_same_from_the_old_and_the_new_one(averaged_checkpoint, tmp_path):
    # The weights being trained, and their statistics, are beside the averages and untouched.
    recalibrate_checkpoint(averaged_checkpoint, Net(), batches(), tmp_path / "new.ckpt", prefix="net.")
    ends = []
    for index, path in enumerate((averaged_checkpoint, tmp_path / "new.ckpt")):
        fit(tmp_path / str(index), ema(), ckpt_path=path, max_epochs=2)
        ends.append(read(tmp_path / str(index) / "epoch=1.ckpt")["current_model_state"])
    assert differences(*ends) == []


# State dicts


def saved(state: Any, tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "old.pt")
    return tmp_path / "old.pt"


def test_plain_state_dict_gets_the_statistics_of_the_batches(tmp_path):
    model = fill_statistics(seeded(SmallResNet))
    path = saved(model.state_dict(), tmp_path)
    data = [images(8, seed=seed) for seed in range(3)]
    done = recalibrate_checkpoint(path, SmallResNet(), data, tmp_path / "new.pt", exclude="layer1")
    old, new = read(path), read(tmp_path / "new.pt")
    changed = [f"/{name}.{key}" for name in done.recalibration.layers for key in ("running_mean", "running_var")]
    assert sorted(differences(old, new)) == sorted(changed)
    assert not any("layer1." in name for name in changed)
    loaded = SmallResNet()
    loaded.load_state_dict(new)
    assert_all_statistics(loaded, layer_inputs(model, data, done.recalibration.layers))


def test_shared_layer_is_rewritten_under_each_of_its_names(tmp_path):
    path = saved(fill_statistics(seeded(SharedNorm)).state_dict(), tmp_path)
    recalibrate_checkpoint(path, SharedNorm(), [images(8)], tmp_path / "new.pt")
    new = read(tmp_path / "new.pt")
    assert bits(new["first.norm.running_var"]) == bits(new["second.norm.running_var"])
    assert bits(new["first.norm.running_var"]) != bits(read(path)["first.norm.running_var"])


def test_options_are_those_of_recalibrate(tmp_path):
    path = saved(seeded(SmallResNet).state_dict(), tmp_path)
    data = [{"image": images(4, seed=seed)} for seed in range(5)]
    done = recalibrate_checkpoint(
        path,
        SmallResNet(),
        data,
        tmp_path / "new.pt",
        num_batches=2,
        forward=lambda model, batch: model(batch["image"]),
    )
    assert done.recalibration.num_batches == 2


def test_statistics_of_other_layers_keep_their_dtype_and_bits(tmp_path):
    # A checkpoint in float64, recalibrated with a model in float32.
    path = saved(fill_statistics(seeded(SmallResNet).double()).state_dict(), tmp_path)
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt", modules="head")
    assert all("head" in name for name in differences(read(path), read(tmp_path / "new.pt")))


class Versioned(nn.Module):
    """Its second version scales what its first one did not; states of the first are converted."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bn = nn.Parameter(torch.ones(1)), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x * self.scale)

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}scale"] = 100 * state[f"{prefix}scale"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_module_that_migrates_old_states_is_given_the_version_of_the_file(tmp_path, prefix):
    whole = nn.ModuleDict({"model": Versioned()}) if prefix else Versioned()
    path = saved(whole.state_dict(), tmp_path)
    model = Versioned()
    recalibrate_checkpoint(path, model, [images(8)], tmp_path / "new.pt", prefix=prefix)
    assert model.scale.item() == 1


# Where in the file


def test_prefix_is_found_where_one_fits_and_that_is_said(lightning_checkpoint, tmp_path):
    done = recalibrate_checkpoint(lightning_checkpoint, Net(), batches(), tmp_path / "new.ckpt")
    assert_precise(read(tmp_path / "new.ckpt")["state_dict"])
    assert "read from 'net." in str(done)


@pytest.mark.parametrize("key", ["model_state_dict", "model", "net", "ema", "weights.of.model"])
def test_state_dict_is_found_under_any_key_and_that_is_said(tmp_path, key):
    content = state = fill_statistics(seeded(SmallResNet)).state_dict()
    for part in reversed(key.split(".")):
        content = {part: content, "epoch": 3}
    path = saved(content, tmp_path)
    done = recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt")
    assert f"entry '{key}'" in str(done)
    new = read(tmp_path / "new.pt")
    for part in key.split("."):
        assert new["epoch"] == 3
        new = new[part]
    changed = [f"/{name}.{value}" for name in done.recalibration.layers for value in ("running_mean", "running_var")]
    assert sorted(differences(state, new)) == sorted(changed)


def test_which_of_two_entries_is_meant_has_to_be_said(tmp_path):
    plain, averaged = fill_statistics(seeded(SmallResNet)).state_dict(), seeded(SmallResNet).state_dict()
    path = saved({"model": plain, "ema": averaged}, tmp_path)
    with pytest.raises(ValueError, match=r"several of its state dicts do; choose key='model' .* or key='ema'"):
        recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt")
    with pytest.raises(ValueError, match="no state dict under key='emma', only under 'model', 'ema'"):
        recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt", key="emma")
    assert list(tmp_path.iterdir()) == [path]
    done = recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt", key="ema")
    assert done.entries_left == ("model",)
    new = read(tmp_path / "new.pt")
    assert differences(plain, new["model"]) == []
    assert differences(averaged, new["ema"]) != []


def test_other_weights_in_a_checkpoint_of_lightning_are_named_as_left(lightning_checkpoint, tmp_path):
    content = read(lightning_checkpoint)
    content["ema_state_dict"] = {f"module.{name}": value for name, value in content["state_dict"].items()}
    path = saved(content, tmp_path)
    done = recalibrate_checkpoint(path, Net(), batches(), tmp_path / "new.pt")
    assert done.entries_left == ("ema_state_dict",)
    assert "'ema_state_dict' of the same file not changed (key= or --key chooses)" in str(done)
    assert recalibrate_checkpoint(lightning_checkpoint, Net(), batches(), tmp_path / "n.pt").entries_left == ()


def test_which_of_two_networks_is_meant_has_to_be_said(tmp_path):
    both = nn.ModuleDict({"student": seeded(SmallResNet), "teacher": seeded(SmallResNet)})
    path = saved(both.state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r"prefix='student\.' or .*prefix='teacher\.'"):
        recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt")
    done = recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt", prefix="teacher.")
    changed = differences(read(path), read(tmp_path / "new.pt"))
    assert changed
    assert all(name.startswith("/teacher.") for name in changed)
    assert "student.bn1" in str(done)


def compiled(module: nn.Module) -> nn.Module:
    """As ``torch.compile`` wraps it, without its import of the compiler."""
    return nn.ModuleDict({"_orig_mod": module})


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compiled": compiled,
    "compiled in DataParallel": lambda model: nn.DataParallel(compiled(model)),
    "DataParallel in a module": lambda model: nn.ModuleDict({"net": nn.DataParallel(model)}),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_that_wrappers_add_to_are_found(tmp_path, wrapper):
    path = saved(WRAPPERS[wrapper](fill_statistics(seeded(SmallResNet))).state_dict(), tmp_path)
    data = [images(8, seed=seed) for seed in range(3)]
    model = SmallResNet()
    torch.save({**read(path), **{n: torch.tensor(7) for n in read(path) if n.endswith("num_batches_tracked")}}, path)
    done = recalibrate_checkpoint(path, model, data, tmp_path / "new.pt")
    assert len(differences(read(path), read(tmp_path / "new.pt"))) == 2 * len(done.recalibration.layers)
    assert_all_statistics(model, layer_inputs(model, data, done.recalibration.layers))
    assert set(take_snapshot(model).num_batches_tracked.tolist()) == {7}


def test_file_of_fabric_is_found_under_the_name_it_was_given(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    net = fabric.setup_module(fill_statistics(seeded(SmallResNet)))
    fabric.save(tmp_path / "old.ckpt", {"network": net, "iteration": 5})
    done = recalibrate_checkpoint(tmp_path / "old.ckpt", SmallResNet(), [images(8)], tmp_path / "new.ckpt")
    assert "entry 'network'" in str(done)
    assert read(tmp_path / "new.ckpt")["iteration"] == 5


def test_file_of_the_bare_network_fits_the_module_around_it(tmp_path):
    path = saved(fill_statistics(seeded(SmallResNet)).state_dict(), tmp_path)
    whole = nn.Sequential(OrderedDict(model=SmallResNet()))
    done = recalibrate_checkpoint(path, whole, [images(8)], tmp_path / "new.pt")
    assert all(name.startswith("model.") for name in done.recalibration.layers)
    changed = differences(read(path), read(tmp_path / "new.pt"))
    assert sorted(changed) == sorted(
        f"/{name.removeprefix('model.')}.{value}"
        for name in done.recalibration.layers
        for value in ("running_mean", "running_var")
    )


def test_state_dict_without_counters_is_taken_and_gets_none(tmp_path):
    state = fill_statistics(seeded(SmallResNet)).state_dict()
    old = OrderedDict((name, value) for name, value in state.items() if "num_batches_tracked" not in name)
    path = saved(old, tmp_path)
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt")
    assert list(read(tmp_path / "new.pt")) == list(old)


def test_layers_of_the_file_that_the_model_lacks_are_counted_and_named(tmp_path):
    whole = nn.ModuleDict({"model": seeded(SmallResNet), "head": nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(4))})
    path = saved(whole.state_dict(), tmp_path)
    done = recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt")
    assert done.not_in_model == ("head.0", "head.1")
    assert "2 BatchNorm layers of the file not in the model and left as they were: 'head.0', 'head.1'" in str(done)


# What is frozen


def frozen_fit(folder: Path, **freeze: Any) -> Path:
    fit(folder, BatchNormFreezer(**freeze))
    return folder / "last.ckpt"


@pytest.mark.filterwarnings("ignore:.*freezing .* with their initial running statistics")
def test_layers_that_the_file_records_as_frozen_are_left_out_unless_told_to(tmp_path):
    path = frozen_fit(tmp_path / "fit", modules=LAYERS[0])
    for model in (Net(), Classifier()):
        done = recalibrate_checkpoint(path, model, batches(), tmp_path / "new.ckpt", overwrite=True)
        assert len(done.recalibration.frozen) == 1
        assert LAYERS[0].endswith(done.recalibration.frozen[0])
        assert "1 frozen layer left unchanged" in str(done)
        changed = differences(read(path), without_record(read(tmp_path / "new.ckpt")))
        assert changed
        assert not any(LAYERS[0] in name for name in changed)
        assert not any(status.stats_frozen_by for status in status_by_name(model).values())
    done = recalibrate_checkpoint(path, Net(), batches(), tmp_path / "all.ckpt", recalibrate_frozen=True)
    assert done.recalibration.frozen == ()
    assert_precise(read(tmp_path / "all.ckpt")["state_dict"])


def test_layers_of_which_only_weights_were_frozen_are_recalibrated(tmp_path):
    path = frozen_fit(tmp_path / "fit", modules=LAYERS[0], stats=False)
    done = recalibrate_checkpoint(path, Net(), batches(), tmp_path / "new.ckpt")
    assert done.recalibration.frozen == ()


@pytest.mark.filterwarnings("ignore:.*freezing .* with their initial running statistics")
def test_file_with_every_layer_frozen_is_an_error_that_names_the_switch(tmp_path):
    path = frozen_fit(tmp_path / "fit")
    model = Net()
    with pytest.raises(RecalibrationError, match=r"last\.ckpt records them as frozen: see recalibrate_frozen="):
        recalibrate_checkpoint(path, model, batches(), tmp_path / "new.ckpt")
    assert not (tmp_path / "new.ckpt").exists()
    assert not any(status.stats_frozen_by for status in status_by_name(model).values())


# Refusals


@pytest.mark.parametrize(("scale", "value"), [(1000.0, "running_var"), (1e5, "running_mean")])
def test_statistics_that_the_dtype_of_the_file_cannot_hold_are_an_error_and_nothing_is_written(tmp_path, scale, value):
    model = nn.Sequential(nn.BatchNorm1d(2))
    path = saved(model.half().state_dict(), tmp_path)
    data = scale * (torch.randn(32, 2, generator=torch.Generator().manual_seed(0)) * (value == "running_var") + 1)
    with pytest.raises(
        ValueError, match=rf"layer '0': its {value} reaches .* torch\.float16 in the file ends at 65504"
    ):
        recalibrate_checkpoint(path, nn.Sequential(nn.BatchNorm1d(2)), [data], tmp_path / "new.pt")
    assert list(tmp_path.iterdir()) == [path]


def test_statistics_that_half_precision_can_hold_are_written_in_it(tmp_path):
    path = saved(nn.Sequential(nn.BatchNorm1d(2)).half().state_dict(), tmp_path)
    recalibrate_checkpoint(path, nn.Sequential(nn.BatchNorm1d(2)), [torch.eye(2)], tmp_path / "new.pt")
    assert read(tmp_path / "new.pt")["0.running_mean"].tolist() == [0.5, 0.5]
    assert read(tmp_path / "new.pt")["0.running_mean"].dtype == torch.float16


def test_other_shapes_are_an_error_that_names_them(tmp_path):
    path = saved(nn.Sequential(nn.BatchNorm1d(2)).state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r"has other shapes of '0\.weight'"):
        recalibrate_checkpoint(path, nn.Sequential(nn.BatchNorm1d(3)), [torch.ones(4, 3)], tmp_path / "new.pt")


def test_file_that_exists_is_not_overwritten_unless_told_to(tmp_path):
    path = saved(fill_statistics(seeded(SmallResNet)).state_dict(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        recalibrate_checkpoint(path, SmallResNet(), [images(8)], path)
    assert path.read_bytes() == before
    done = recalibrate_checkpoint(path, SmallResNet(), [images(8)], path, overwrite=True)
    assert done.path == path
    assert path.read_bytes() != before
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_prefix_is_an_error_that_names_the_right_one(lightning_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"prefix='model\.'.*prefix='net\.'"):
        recalibrate_checkpoint(lightning_checkpoint, Net(), batches(), tmp_path / "new.ckpt", prefix="model.")
    assert list(tmp_path.iterdir()) == []


def test_model_that_is_another_one_is_an_error_that_names_what_is_missing(lightning_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"SmallResNet.*lacks.*bn1"):
        recalibrate_checkpoint(lightning_checkpoint, SmallResNet(), batches(), tmp_path / "new.ckpt", prefix="net.")
    assert list(tmp_path.iterdir()) == []


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_file_with_pickled_objects_is_refused_and_nothing_in_it_is_executed(tmp_path):
    marker = tmp_path / "executed"
    state = {"state_dict": seeded(SmallResNet).state_dict(), "hyper_parameters": Hostile(marker)}
    path = saved(state, tmp_path)
    with pytest.raises(pickle.UnpicklingError, match=r"old\.pt holds objects besides tensors"):
        recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt")
    assert list(tmp_path.iterdir()) == [path]
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file is not hostile"


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"state_dict": {"a": 1}}], ids=str)
def test_file_without_a_state_dict_is_an_error_that_says_so(tmp_path, content):
    path = saved(content, tmp_path)
    with pytest.raises(ValueError, match="holds no state dict"):
        recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt")


def failing(error: BaseException):
    yield images(8)
    raise error


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (lambda: failing(OSError("disk gone")), OSError),
        (lambda: failing(KeyboardInterrupt()), KeyboardInterrupt),
        (list, RecalibrationError),
        (lambda: [torch.full((4, 3, 6, 6), torch.nan)], RecalibrationError),
    ],
    ids=["loader fails", "interrupted", "no batch", "not finite"],
)
def test_recalibration_that_fails_leaves_no_file(tmp_path, data, error):
    path = saved(seeded(SmallResNet).state_dict(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(error):
        recalibrate_checkpoint(path, SmallResNet(), data(), tmp_path / "folder" / "new.pt")
    with pytest.raises(error):
        recalibrate_checkpoint(path, SmallResNet(), data(), path, overwrite=True)
    assert list(tmp_path.rglob("*")) == [path]
    assert path.read_bytes() == before


def test_file_that_cannot_be_written_leaves_nothing_half_written(tmp_path):
    path = saved(seeded(SmallResNet).state_dict(), tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").touch()
    with pytest.raises(OSError, match="taken"):
        recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "taken", overwrite=True)
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "taken"]


def test_new_file_can_be_read_by_whoever_can_read_any_new_file(tmp_path):
    path = saved(seeded(SmallResNet).state_dict(), tmp_path)
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "new.pt")
    assert (tmp_path / "new.pt").stat().st_mode == path.stat().st_mode


def test_folder_of_the_new_file_is_made(tmp_path):
    path = saved(seeded(SmallResNet).state_dict(), tmp_path)
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "a" / "b" / "new.pt")
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["new.pt"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_folder_as_out_is_refused_by_name_before_anything_is_read(tmp_path, overwrite):
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(IsADirectoryError, match="is a folder: name the file"):
        recalibrate_checkpoint(tmp_path / "none.pt", nn.BatchNorm1d(2), [], out=tmp_path, overwrite=overwrite)
    assert sorted(tmp_path.parent.iterdir()) == before


def test_lazy_layer_that_loads_its_values_is_told_to_run_once(tmp_path):
    torch.save(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(), tmp_path / "a.pt")
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyBatchNorm1d())
    with pytest.raises(SelectionError, match=r"'1' is a LazyBatchNorm1d that has loaded its values.*one forward pass"):
        recalibrate_checkpoint(tmp_path / "a.pt", model, [torch.randn(8, 2)], out=tmp_path / "b.pt")


def test_statistics_of_other_tasks_stay_as_they_are_and_are_named(tmp_path: Path) -> None:
    net = fill_statistics(seeded(SmallResNet))
    bank = task_statistics(net, ["det", "seg", "depth"], default="seg")
    saved = {"state_dict": net.state_dict(), "callbacks": {"TaskBatchNorm[one]": bank.state_dict()}}
    torch.save(saved, tmp_path / "model.ckpt")
    bank.release()
    data = [images(8, seed=seed) for seed in range(3)]
    with pytest.warns(UserWarning, match="statistics of the tasks 'det', 'depth' too, which were left as they were"):
        done = recalibrate_checkpoint(tmp_path / "model.ckpt", net, data, tmp_path / "out.ckpt")
    assert done.tasks_left == ("det", "depth")
    assert str(done).endswith("'det', 'depth' too, which were left as they were")
    found = torch.load(tmp_path / "out.ckpt", weights_only=True)
    before = {(task, key): bits(value) for task, one in bank_sets(saved) for key, value in one.items()}
    assert {(task, key): bits(value) for task, one in bank_sets(found) for key, value in one.items()} == before
    twin = fill_statistics(seeded(SmallResNet))
    recalibrate(twin, data)
    assert bits(found["state_dict"]["bn1.running_mean"]) == bits(twin.bn1.running_mean)


def bank_sets(checkpoint: dict[str, Any]) -> list[tuple[str, dict[str, Tensor]]]:
    return list(checkpoint["callbacks"]["TaskBatchNorm[one]"]["sets"].items())


def test_a_model_with_statistics_per_task_is_refused_and_nothing_is_read(tmp_path: Path) -> None:
    net = fill_statistics(seeded(SmallResNet))
    torch.save(net.state_dict(), tmp_path / "model.pt")
    net.bn1.running_mean.add_(1)
    bank = task_statistics(net, ["det", "seg"], "bn1")
    before = state_bits(net)
    with pytest.raises(ValueError, match=r"'bn1' of the model has statistics per task.*release"):
        recalibrate_checkpoint(tmp_path / "model.pt", net, [images(8)], tmp_path / "out.pt")
    assert state_bits(net) == before
    assert not (tmp_path / "out.pt").exists()
    bank.release()


# several files


def several(tmp_path: Path, count: int = 3, **changes: Any) -> list[Path]:
    """Files of one model after other trainings."""
    paths = []
    for index in range(count):
        net = fill_statistics(seeded(Net, index))
        path = tmp_path / f"{index}.pt"
        torch.save({"state_dict": net.state_dict(), "epoch": index, **changes}, path)
        paths.append(path)
    return paths


@pytest.mark.parametrize("count", [2, 3])
def test_the_average_of_several_files_is_what_is_recalibrated(tmp_path: Path, count: int) -> None:
    paths = several(tmp_path, count)
    done = recalibrate_checkpoint(paths, Net(), batches(), tmp_path / "soup.pt")
    states = [read(path)["state_dict"] for path in paths]
    soup = read(tmp_path / "soup.pt")
    for name, value in soup["state_dict"].items():
        if "running" not in name and "num_batches" not in name:
            expected = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-7, atol=0)
    assert_precise(soup["state_dict"], "")
    assert soup["epoch"] == 0
    assert str(done).startswith(f"soup.pt: average of {count} files, weights as saved")
    assert done.files == tuple(path.name for path in paths)


def test_one_file_in_a_list_is_that_file(tmp_path: Path) -> None:
    paths = several(tmp_path, 1)
    done = recalibrate_checkpoint(paths, Net(), batches(), tmp_path / "one.pt")
    recalibrate_checkpoint(paths[0], Net(), batches(), tmp_path / "other.pt")
    assert done.files == ()
    assert not differences(read(tmp_path / "one.pt"), read(tmp_path / "other.pt"))


def test_averages_keep_the_dtype_of_the_first_file(tmp_path: Path) -> None:
    paths = several(tmp_path, 2)
    content = read(paths[0])
    content["state_dict"] = {
        name: value.half() if value.is_floating_point() else value for name, value in content["state_dict"].items()
    }
    torch.save(content, paths[0])
    recalibrate_checkpoint(paths, Net(), batches(), tmp_path / "soup.pt")
    values = [value for value in read(tmp_path / "soup.pt")["state_dict"].values() if value.is_floating_point()]
    assert {value.dtype for value in values} == {torch.float16}


class Unusual(Net):
    """Complex values, whole numbers beyond what a double holds, and a weight with two names."""

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("rotation", torch.full((2,), complex(value, -value)))
        self.register_buffer("stamp", torch.tensor(2**60 + 1))
        self.tied = next(self.parameters())


def test_complex_values_are_averaged_whole_numbers_kept_and_tied_weights_stay_tied(tmp_path: Path) -> None:
    paths = []
    for value in (1.0, 3.0):
        paths.append(tmp_path / f"{value}.pt")
        torch.save(fill_statistics(Unusual(value)).state_dict(), paths[-1])
    recalibrate_checkpoint(paths, Unusual(), batches(), tmp_path / "soup.pt")
    soup = read(tmp_path / "soup.pt")
    assert soup["rotation"].tolist() == [2 - 2j] * 2
    assert soup["stamp"].item() == 2**60 + 1
    names = [name for name, value in soup.items() if value.data_ptr() == soup["tied"].data_ptr()]
    assert len(names) == 2


class Indexed(Net):
    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(start, start + 3))


def test_whole_numbers_that_differ_have_no_average_and_nothing_is_written(tmp_path: Path) -> None:
    paths = []
    for start in (0, 0, 1):
        paths.append(tmp_path / f"{len(paths)}.pt")
        torch.save(fill_statistics(Indexed(start)).state_dict(), paths[-1])
    recalibrate_checkpoint(paths[:2], Indexed(), batches(), tmp_path / "soup.pt")
    assert read(tmp_path / "soup.pt")["positions"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"2\.pt: 'positions' holds whole numbers"):
        recalibrate_checkpoint(paths, Indexed(), batches(), tmp_path / "other.pt")
    assert not (tmp_path / "other.pt").exists()


def test_a_file_of_another_model_among_several_is_named(tmp_path: Path) -> None:
    paths = several(tmp_path, 2)
    torch.save(SmallResNet().state_dict(), paths[1])
    with pytest.raises(ValueError, match=r"1\.pt does not fit Net"):
        recalibrate_checkpoint(paths, Net(), batches(), tmp_path / "soup.pt")
    with pytest.raises(ValueError, match="path is an empty list"):
        recalibrate_checkpoint([], Net(), batches(), tmp_path / "soup.pt")
    assert not (tmp_path / "soup.pt").exists()
