"""What people's steps and loaders refer to: the pass leaves it alone, or it is refused by its path."""

import csv
import io
import itertools
import json
import logging
import multiprocessing
import operator
import os
import queue
import re
import sqlite3
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from lightning_bn import PreciseBatchNorm
from lightning_bn.callbacks._second_run import drawn_once, sources
from lightning_bn.functional import _object_copies, take_snapshot
from tests.callbacks.fits import Classifier, quiet, samples, train_loader, trajectory, val_loader
from tests.callbacks.freezing_fits import said

#: Each pass runs in a copy of the process.
pytestmark = pytest.mark.processes

SETTINGS = {"val_check_interval": 2, "num_sanity_val_steps": 0}


def data() -> dict[str, Any]:
    return {"train_dataloaders": train_loader(), "val_dataloaders": val_loader()}


def assert_same_fit(build: Callable[[], Classifier], loaders: Callable[[], Any] = data, **kwargs: Any) -> Classifier:
    """With and without the callback the same batches, losses and weights; with it, what the pass found is in place."""
    precise = PreciseBatchNorm(num_batches=3)
    without = trajectory(build, loaders, **SETTINGS, **kwargs)
    with_it = trajectory(build, loaders, precise, **SETTINGS, **kwargs)
    assert without[:2] == with_it[:2]
    assert precise.last is not None
    assert precise.last.after.same_bits(take_snapshot(with_it[2]))
    assert float(precise.last.after.var.min()) > 0
    return with_it[2]


# What loaders refer to


class Augmented(Dataset[Any]):
    """Refers to the network, as a transform that extracts features or a hard-negative miner does."""

    def __init__(self, owner: Any) -> None:
        self.data, self.owner = samples(), owner

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


@pytest.mark.parametrize("refers_to", ["module", "layer", "statistics", "collate function"])
def test_dataset_that_refers_to_the_network_leaves_the_statistics_in_place(refers_to):
    modules: list[Classifier] = []

    def build() -> Classifier:
        modules.append(Classifier())
        return modules[-1]

    def loaders() -> dict[str, Any]:
        module = modules[-1]
        owner = {
            "module": module,
            "layer": [module.net.bn],
            "statistics": {"held": dict(module.net.bn.named_buffers())},
        }
        kwargs: dict[str, Any] = {}
        if refers_to == "collate function":
            kwargs["collate_fn"] = lambda items: (module, default_collate(items))[1]
        return {**data(), "train_dataloaders": train_loader(Augmented(owner.get(refers_to)), **kwargs)}

    assert_same_fit(build, loaders)


class OwnMethods(pl.LightningDataModule):
    """Gives the loader methods of its own, and so refers to Trainer, module and callbacks."""

    def train_dataloader(self) -> Any:
        return train_loader(collate_fn=self.collate)

    def val_dataloader(self) -> Any:
        return val_loader()

    def collate(self, items: list[Any]) -> Any:
        return default_collate(items)


def test_collate_function_that_is_a_method_of_the_datamodule():
    assert_same_fit(Classifier, lambda: {"datamodule": OwnMethods()})


RNG = np.random.default_rng(3)


class AtModuleLevel(Augmented):
    def __getitem__(self, index: int) -> Any:
        x, *rest = self.data[index]
        return x + float(RNG.normal()), *rest


def test_random_state_at_module_level_is_not_moved():
    states = []
    for callbacks in ([], [PreciseBatchNorm(num_batches=3)]):
        RNG.bit_generator.state = np.random.default_rng(3).bit_generator.state
        loaders = {**data(), "train_dataloaders": train_loader(AtModuleLevel(None))}
        states.append(trajectory(Classifier, partial(dict, loaders), *callbacks, **SETTINGS)[:2])
    assert states[0] == states[1]


class Stream(IterableDataset[Any]):
    """Gives what is left of a source that lives as long as the dataset."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return (self.sample(value) for value in (self.source if hasattr(self.source, "__next__") else self.drawn()))

    def drawn(self) -> Iterator[Any]:
        while True:
            yield self.source.get(timeout=5)

    def sample(self, value: Any) -> Any:
        return samples()[int(value) % 28]


def test_generator_that_lives_in_the_dataset_loses_nothing():
    assert_same_fit(
        Classifier,
        lambda: {**data(), "train_dataloaders": DataLoader(Stream(n for n in range(999)), batch_size=8)},
        limit_train_batches=6,
    )


def shared_sources(folder: Any) -> dict[str, Callable[[], Any]]:
    path = folder / "numbers"
    path.write_text("".join(f"{n}\n" for n in range(128)))
    filled: queue.Queue[int] = queue.Queue()
    pipe: Any = multiprocessing.Queue()
    for n in range(128):
        filled.put(n)
        pipe.put(n)
    return {"file": path.open, "queue": lambda: filled, "pipe": lambda: pipe}


@pytest.mark.parametrize("kind", ["file", "queue", "pipe"])
def test_what_a_copy_of_the_process_would_share_is_refused_before_training(tmp_path, kind):
    source = shared_sources(tmp_path)[kind]()

    class Untrained(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("trained")

    loader = DataLoader(Stream(source), batch_size=8)
    with pytest.raises(MisconfigurationException, match=r"train_dataloader\.dataset\.source.*source='recent'"):
        quiet(callbacks=[PreciseBatchNorm(num_batches=2)], **SETTINGS).fit(Untrained(), loader, val_loader())
    if kind != "queue":
        source.close()


def test_endless_loader_without_a_limit_is_refused_before_training():
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return (samples()[n % 28] for n in itertools.count())

    trainer = quiet(callbacks=[PreciseBatchNorm(num_batches=None)], max_steps=4, max_epochs=-1, val_check_interval=2)
    with pytest.raises(MisconfigurationException, match=r"num_batches=None.*Set num_batches"):
        trainer.fit(Classifier(), DataLoader(Endless(), batch_size=8), val_loader())


@pytest.mark.parametrize("shares", ["generator", "persistent workers", "dataset"])
def test_source_method_that_shares_with_training_disturbs_nothing(shares):
    kwargs: dict[str, Any] = {"num_workers": 1, "persistent_workers": True} if shares == "persistent workers" else {}

    class Shares(Classifier):
        def __init__(self) -> None:
            super().__init__()
            if shares == "generator":
                kwargs["generator"] = torch.Generator().manual_seed(4)
            self.loader = train_loader(Augmented(None), **kwargs)

        def train_dataloader(self) -> Any:
            return self.loader

        def target_dataloader(self) -> Any:
            return self.loader if shares == "persistent workers" else train_loader(self.loader.dataset, **kwargs)

    runs = [
        trajectory(Shares, lambda: {"val_dataloaders": val_loader()}, *callbacks, **SETTINGS)
        for callbacks in ([], [PreciseBatchNorm(num_batches=3, source_method="module.target_dataloader")])
    ]
    assert runs[0][:2] == runs[1][:2]


def test_where_no_process_can_be_forked_copies_are_iterated_and_it_is_said(monkeypatch):
    monkeypatch.setattr(sources, "can_fork", lambda: False)

    class OwnNoise(Augmented):
        def __init__(self) -> None:
            super().__init__(None)
            self.rng = np.random.default_rng(0)

        def __getitem__(self, index: int) -> Any:
            x, *rest = self.data[index]
            return x + float(self.rng.normal()), *rest

    with pytest.warns(UserWarning, match=r"cannot be forked.*source='recent'"):
        assert_same_fit(Classifier, lambda: {**data(), "train_dataloaders": train_loader(OwnNoise())})


def test_error_of_a_dataset_in_the_pass_is_the_datasets_own_and_says_where():
    class Fails(Augmented):
        def __getitem__(self, index: int) -> Any:
            if multiprocessing.parent_process() is not None:
                raise KeyError("sample")
            return super().__getitem__(index)

    with pytest.raises(KeyError, match="sample"):
        quiet(callbacks=[PreciseBatchNorm()], **SETTINGS).fit(Classifier(), train_loader(Fails(None)), val_loader())


def test_process_that_dies_is_an_error_that_names_the_choices():
    class Dies(Augmented):
        def __getitem__(self, index: int) -> Any:
            if multiprocessing.parent_process() is not None:
                os._exit(3)
            return super().__getitem__(index)

    with pytest.raises(MisconfigurationException, match=r"exit code 3.*source='recent'"):
        quiet(callbacks=[PreciseBatchNorm()], **SETTINGS).fit(Classifier(), train_loader(Dies(None)), val_loader())


# What the module holds


@pytest.mark.parametrize(
    "make",
    [
        lambda: re.compile("a"),
        lambda: operator.itemgetter(1),
        json.JSONDecoder,
        lambda: csv.writer(io.StringIO()),
        lambda: sqlite3.connect(":memory:"),
        lambda: logging.getLogger("somebody"),
        lambda: lambda x: x,
    ],
    ids=["pattern", "itemgetter", "decoder", "csv writer", "connection", "logger", "lambda"],
)
def test_attribute_that_cannot_be_written_to_stops_nothing(make):
    class Holds(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.held = {"in": [make()]}

    assert_same_fit(Holds)


def test_what_cannot_be_copied_is_said_once():
    class Holds(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.database = sqlite3.connect(":memory:")

    with said() as lines:
        assert_same_fit(Holds)
    [line] = [line for line in lines if "cannot be copied" in line]
    assert "self.database" in line
    assert "step='forward'" in line


@pytest.mark.parametrize(
    "make",
    [
        lambda: iter(train_loader()),
        lambda: (n for n in range(100)),
        itertools.count,
        lambda: itertools.cycle([1]),
        queue.Queue,
        lambda: io.BufferedReader(io.BytesIO(b"1")),
    ],
    ids=["loader", "generator", "count", "cycle", "queue", "file"],
)
def test_second_source_of_batches_is_refused_before_training_by_its_path(make):
    class Draws(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.helper = {"more": make()}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("trained")

    with pytest.raises(MisconfigurationException, match=r"self\.net\.helper\['more'\].*only once"):
        trajectory(Draws, data, PreciseBatchNorm(num_batches=2))


def test_another_step_may_be_chosen_beside_a_second_source():
    class Draws(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = itertools.count()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (1 + next(self.numbers) % 3)

    runs = [trajectory(Draws, data, *used, **SETTINGS) for used in ([], [PreciseBatchNorm(2, step="forward")])]
    assert runs[0][:2] == runs[1][:2]


class Drawing(Classifier):
    """Takes from an iterator that nobody finds: it lies at module level."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not torch.is_grad_enabled():
            next(iter(()))
        return super().training_step(batch, batch_idx)


def test_iterator_that_runs_out_in_the_pass_does_not_end_the_epoch():
    with pytest.raises(RuntimeError, match="ran out of batches"):
        trajectory(Drawing, data, PreciseBatchNorm(num_batches=2), **SETTINGS)


def test_list_on_the_class_is_as_if_the_step_had_not_run():
    class Listing(Classifier):
        seen: ClassVar[list[int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            type(self).seen.append(batch_idx)
            return super().training_step(batch, batch_idx) * (1 + len(self.seen) % 3)

    lengths = []
    for callbacks in ([], [PreciseBatchNorm(num_batches=3)]):
        Listing.seen = kept = []
        trajectory(Listing, data, *callbacks, **SETTINGS)
        assert Listing.seen is kept
        lengths.append(len(kept))
    assert lengths[0] == lengths[1] == 8


def counting() -> Callable[[], int]:
    count = 0

    def next_one() -> int:
        nonlocal count
        count += 1
        return count

    return next_one


def test_function_of_the_modules_that_counts_is_as_if_the_step_had_not_run():
    class Counts(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.count = counting()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (1 + self.count() % 3)

    assert assert_same_fit(Counts).count() == 9


def test_large_attribute_is_as_if_the_step_had_not_run():
    class Bank(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.bank = torch.zeros(5000, 5000)  # 95 MiB

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.bank[0, 0] += 1
            return super().training_step(batch, batch_idx) * (1 + self.bank[0, 0] % 3)

    assert float(assert_same_fit(Bank, max_epochs=1).bank[0, 0]) == 4


# What a step writes


@pytest.mark.parametrize("when", ["odd batches", "after a burn-in"])
def test_teacher_moved_in_a_later_batch_is_put_back(when):
    class Taught(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(6, 2).requires_grad_(False)
            nn.init.constant_(self.teacher.weight, 0.1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx % 2 if when == "odd batches" else batch_idx >= 2:
                self.teacher.weight.data.mul_(0.9).add_(self.net.head[3].weight.detach(), alpha=0.1)
            return super().training_step(batch, batch_idx) + self.teacher.weight.sum() * self.net.bn.weight.sum()

    assert_same_fit(Taught)


def test_trained_weight_written_in_a_later_batch_is_refused_and_put_back():
    class Clips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx % 2 and not torch.is_grad_enabled():
                self.net.bn.weight.data.clamp_(max=0.5)
            return super().training_step(batch, batch_idx)

    module = Clips()
    with pytest.raises(MisconfigurationException, match=r"trained weight 'net\.bn\.weight'.*step='forward'"):
        quiet(callbacks=[PreciseBatchNorm(num_batches=3)], **SETTINGS).fit(module, **data())
    assert float(module.net.bn.weight.detach().max()) > 0.5


def test_gradients_that_a_step_computes_itself_are_gone():
    class Adversarial(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with torch.enable_grad():
                x = batch[0].clone().requires_grad_()
                self.net(x).sum().backward()
            return super().training_step([x.detach() + 0.01 * x.grad.sign(), batch[1]], batch_idx)

    assert_same_fit(Adversarial, accumulate_grad_batches=3)


def test_inside_the_pass_loggers_are_of_their_class_and_folders_the_same(tmp_path):
    seen: list[Any] = []

    class Looks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append((self.trainer.log_dir, isinstance(self.logger, CSVLogger), self.logger.name))
            return super().training_step(batch, batch_idx)

    quiet(callbacks=[PreciseBatchNorm(num_batches=2)], logger=CSVLogger(tmp_path), **SETTINGS).fit(Looks(), **data())
    assert len(set(seen)) == 1
    assert seen[0][1]


STEP_RNG = np.random.default_rng(5)


class DrawsBeside(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + float(STEP_RNG.random()))


def test_generator_beside_the_modules_class_is_as_if_the_step_had_not_run():
    def build() -> Classifier:
        STEP_RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state
        return DrawsBeside()

    own = STEP_RNG
    assert_same_fit(build)
    assert STEP_RNG is own


# Limits


@pytest.mark.parametrize("make", [lambda: torch.zeros(100), lambda: np.zeros(100)], ids=["tensor", "array"])
def test_what_is_too_large_to_be_copied_must_not_be_written_to(make, monkeypatch):
    monkeypatch.setattr(_object_copies, "LARGEST", 64)

    class Bank(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.bank = make()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not torch.is_grad_enabled():
                self.bank[0] = 1
            return super().training_step(batch, batch_idx)

    with pytest.raises((RuntimeError, ValueError), match=r"written to|read-only"):
        trajectory(Bank, data, PreciseBatchNorm(num_batches=2), **SETTINGS)


def test_what_is_too_large_to_be_copied_may_be_read(monkeypatch):
    monkeypatch.setattr(_object_copies, "LARGEST", 64)

    class Bank(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.bank, self.array = torch.ones(100), np.ones(100)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.bank[0] * float(self.array[0])

    assert assert_same_fit(Bank).array.flags.writeable


@pytest.mark.filterwarnings("ignore:PreciseBatchNorm looked for files, queues and iterators in the first")
def test_search_that_ends_early_says_so(monkeypatch):
    monkeypatch.setattr(drawn_once, "_MOST", 3)

    class Many(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.many = [[n] for n in range(10)]

    with pytest.warns(UserWarning, match=r"first 3 objects below self\.many"):
        trajectory(Many, data, PreciseBatchNorm(num_batches=2), **SETTINGS)


# Batches


@pytest.mark.parametrize("source", ["train", "recent"])
@pytest.mark.filterwarnings("ignore:.*train_dataloader yielded None")
def test_batches_that_are_none_are_left_out_as_the_trainer_does(source):
    def loaders() -> dict[str, Any]:
        batches = list(train_loader(shuffle=False))
        return {**data(), "train_dataloaders": DataLoader([batches[0], None, *batches[1:3]], batch_size=None)}

    precise = PreciseBatchNorm(num_batches=4, source=source)
    quiet(callbacks=[precise], num_sanity_val_steps=0, max_epochs=1).fit(Classifier(), **loaders())
    assert precise.last is not None
    assert precise.last.num_batches == 3


def test_source_method_may_return_loaders_that_are_combined():
    class Combined(Classifier):
        def target_dataloader(self) -> Any:
            return CombinedLoader([train_loader()], "sequential")

    precise = PreciseBatchNorm(num_batches=2, source_method="module.target_dataloader")
    quiet(callbacks=[precise], **SETTINGS).fit(Combined(), **data())
    assert precise.last is not None
    assert precise.last.num_batches == 2


# Failures, and what is odd about copies


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, KeyError, StopAsyncIteration])
def test_error_of_a_dataset_is_its_own_whatever_its_kind(error):
    class Fails(Augmented):
        def __getitem__(self, index: int) -> Any:
            if multiprocessing.parent_process() is not None:
                raise error("sample")
            return super().__getitem__(index)

    with pytest.raises(error, match="sample"):
        quiet(callbacks=[PreciseBatchNorm()], **SETTINGS).fit(Classifier(), train_loader(Fails(None)), val_loader())


class Delegates:
    """Hands on whatever it has not, so that an empty one asks itself for ever."""

    def __init__(self) -> None:
        self.inner: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Unpicklable:
    """Can be pickled and not read again."""

    def __init__(self) -> None:
        self.lines: list[int] = []

    def __setstate__(self, state: Any) -> None:
        raise TypeError("not without a connection")


def deep() -> Any:
    chain: Any = []
    for _ in range(5000):
        chain = [chain]
    return chain


@pytest.mark.parametrize("make", [Delegates, Unpicklable, deep])
def test_object_whose_own_way_of_being_copied_fails_is_used_as_it_is_and_said(make):
    class Holds(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.count = make(), 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.count += 1
            return super().training_step(batch, batch_idx) * (1 + self.count % 3)

    with said() as lines:
        assert assert_same_fit(Holds).count == 8
    assert any("self.odd" in line and "cannot be copied" in line for line in lines)


def test_pythons_loggers_are_not_worth_a_sentence():
    class Holds(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.own_log = logging.getLogger("somebody")

    with said() as lines:
        assert_same_fit(Holds)
    assert not any("cannot be copied" in line for line in lines)


def test_module_with_torchscript_in_it_is_recalibrated():
    class Scripted(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.scripted = torch.jit.script(nn.Linear(6, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.scripted(batch[0].flatten(1)[:, :6]).mean()

    assert_same_fit(Scripted)


@pytest.mark.filterwarnings("ignore:PreciseBatchNorm. this process cannot be forked")
def test_where_no_process_can_be_forked_an_iterator_without_a_copy_is_refused(monkeypatch):
    monkeypatch.setattr(sources, "can_fork", lambda: False)
    loader = DataLoader(Stream(n for n in range(999)), batch_size=8)
    trainer = quiet(callbacks=[PreciseBatchNorm(num_batches=2)], limit_train_batches=6, **SETTINGS)
    with pytest.raises(MisconfigurationException, match=r"generator, which cannot be copied.*source='recent'"):
        trainer.fit(Classifier(), loader, val_loader())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_fit_in_which_nothing_is_recalibrated_is_refused_nothing():
    class Draws(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = itertools.count()

    settings = {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2}
    trainer = pl.Trainer(callbacks=[PreciseBatchNorm(num_batches=None)], barebones=True, **settings)
    trainer.fit(Draws(), DataLoader(Stream(n for n in range(999)), batch_size=8))
    assert trainer.global_step == 2
