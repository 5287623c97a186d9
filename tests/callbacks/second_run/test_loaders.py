"""A second pass over training's loaders in the middle of an epoch leaves that epoch as it was."""

import functools
import gc
import multiprocessing
import os
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from lightning_bn import PreciseBatchNorm
from lightning_bn.callbacks._second_run.loading import _packed
from tests.callbacks.fits import RECALIBRATED_FROM, Classifier, quiet, samples, train_loader, trajectory, val_loader
from tests.models import Broken, bits

#: Each pass runs in a copy of the process.
pytestmark = pytest.mark.processes


def assert_bit_identical(
    loader: Callable[[], Any], build: Any = Classifier, batches: int = 2, **settings: Any
) -> PreciseBatchNorm:
    """Two epochs with a validation in the middle of each take the same batches, losses and weights with and without."""
    runs = []
    for callbacks in ([], [PreciseBatchNorm(num_batches=batches)]):
        kwargs = {"val_check_interval": 2, "num_sanity_val_steps": 0, **settings}
        runs.append(
            trajectory(
                build, lambda: {"train_dataloaders": loader(), "val_dataloaders": val_loader()}, *callbacks, **kwargs
            )
        )
    assert len(runs[0][0]) == len(runs[1][0]), "the number of steps differs"
    assert runs[0][:2] == runs[1][:2]
    assert callbacks[0].last is not None
    return callbacks[0]


class Both(Classifier):
    """Trains on two loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = list(batch.values()) if isinstance(batch, dict) else batch
        return sum(super(Both, self).training_step(part, batch_idx) for part in parts if part is not None)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_two_loaders_of_different_lengths(mode, workers):
    def loader() -> Any:
        parts = {"a": train_loader(num_workers=workers), "b": train_loader(samples(16, seed=4))}
        return CombinedLoader(parts, mode)

    assert_bit_identical(loader, Both)


def test_dict_of_two_loaders():
    assert_bit_identical(lambda: {"a": train_loader(), "b": train_loader(samples(16, seed=4))}, Both)


def test_list_of_two_loaders():
    assert_bit_identical(lambda: [train_loader(), train_loader(samples(16, seed=4))], Both)


# Samplers


@pytest.mark.parametrize(
    "sampler",
    [
        lambda data: {"sampler": RandomSampler(data, replacement=True, num_samples=28)},
        lambda data: {"sampler": RandomSampler(data, generator=torch.Generator().manual_seed(3))},
        lambda data: {"sampler": WeightedRandomSampler(torch.rand(28), 28)},
        lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), 8, drop_last=True), "batch_size": 1},
        lambda data: {"sampler": Cursor(28)},
        lambda data: {"sampler": OwnGenerator(28)},
        lambda data: {"batch_sampler": Grouped(data), "batch_size": 1},
        lambda data: {"batch_size": None},
    ],
    ids=["replacement", "generator", "weighted", "batch sampler", "cursor", "own rng", "grouped", "no batching"],
)
def test_samplers(sampler):
    data = samples()

    def loader() -> Any:
        given = sampler(data)
        if given.get("batch_size", 8) is None:
            return DataLoader([[part.clone() for part in data[slice(i, i + 8)]] for i in range(0, 24, 8)], **given)
        return train_loader(data, shuffle=False, **given)

    assert_bit_identical(loader)


class Cursor(Sampler[int]):
    """Goes on where the last epoch ended, and is its own iterator."""

    def __init__(self, length: int) -> None:
        self.length, self.position, self.left = length, 0, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        self.left = self.length
        return self

    def __next__(self) -> int:
        if self.left == 0:
            raise StopIteration
        self.left -= 1
        self.position = (self.position + 3) % self.length
        return self.position


class OwnGenerator(Sampler[int]):
    """Holds a numpy generator."""

    def __init__(self, length: int) -> None:
        self.length, self.rng = length, np.random.default_rng(0)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.permutation(self.length).tolist())


class Grouped(Sampler[list[int]]):
    """Batches of one label; refers to the data as somebody would, and shuffles by the global generators."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data
        self.groups = [list(range(0, 28, 2)), list(range(1, 28, 2))]

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        for group in random.sample(self.groups, 2):
            order = np.random.permutation(group).tolist()
            yield from (order[:7], order[7:])


def test_data_that_a_sampler_refers_to_are_not_copied():
    class Uncopyable(Dataset[Any]):
        def __init__(self) -> None:
            self.data = samples()

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> Any:
            return self.data[index]

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

        __copy__ = __deepcopy__

    assert_bit_identical(lambda: train_loader(Uncopyable()))
    assert_bit_identical(lambda: train_loader(data := Uncopyable(), shuffle=False, sampler=RandomSampler(data)))

    def grouped() -> Any:
        data = Uncopyable()
        return DataLoader(data, batch_sampler=Grouped(data))

    assert_bit_identical(grouped)


class Ongoing(Sampler[int]):
    """Keeps a generator function's state, which cannot be copied."""

    def __init__(self) -> None:
        self.source = (index % 28 for index in range(10**6))

    def __len__(self) -> int:
        return 28

    def __iter__(self) -> Iterator[int]:
        return (next(self.source) for _ in range(28))


def test_sampler_that_cannot_be_copied_goes_on():
    assert_bit_identical(lambda: train_loader(shuffle=False, sampler=Ongoing()))


class Repeated(Sampler[list[int]]):
    """Batches without an end."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield from iter(self.batches)


class MultiEpochs(DataLoader[Any]):
    """A known recipe against the start-up of workers: one iterator for all epochs, kept beside torch's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches = len(self.batch_sampler)
        object.__setattr__(self, "batch_sampler", Repeated(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.batches):
            yield next(self.iterator)


def test_loader_that_keeps_an_iterator_of_its_own_is_an_error_that_says_so():
    with pytest.raises(MisconfigurationException, match="MultiEpochs"):
        assert_bit_identical(lambda: MultiEpochs(samples(), batch_size=8, shuffle=True))


class Prefetching:
    """Somebody's wrapper around a loader."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"num_workers": 1, "persistent_workers": True}, {"generator": 5}, {"shuffle": False, "sampler": 28}],
    ids=["plain", "persistent workers", "generator", "stateful sampler"],
)
def test_loader_that_wraps_another(kwargs):
    def loader() -> Any:
        given = dict(kwargs)
        if "generator" in given:
            given["generator"] = torch.Generator().manual_seed(given["generator"])
        if "sampler" in given:
            given["sampler"] = Cursor(given["sampler"])
        loaders.append(train_loader(**given))
        return Prefetching(loaders[-1])

    loaders: list[Any] = []
    assert_bit_identical(loader)
    for one in loaders:
        if one._iterator is not None:  # Lightning ends the workers of loaders that it sees
            one._iterator._shutdown_workers()


def test_loader_that_can_be_iterated_only_once_is_an_error_that_says_so():
    with pytest.raises(MisconfigurationException, match="once"):
        assert_bit_identical(lambda: iter(train_loader()))


# Datasets that hold generators of their own


class Noisy(Dataset[Any]):
    """Adds noise from a transform."""

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.data, self.transform = samples(), transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, *rest = self.data[index]
        return self.transform(x), *rest


class Noise:
    """A transform with its own generator."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __call__(self, x: Tensor) -> Tensor:
        return add_noise(x, self.rng)

    def apply(self, x: Tensor) -> Tensor:
        return self(x)


class Slotted:
    """A transform without a `__dict__`."""

    __slots__ = ("rng",)

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __call__(self, x: Tensor) -> Tensor:
        return add_noise(x, self.rng)


class Compose:
    """Several transforms in a row."""

    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x


def add_noise(x: Tensor, rng: Any) -> Tensor:
    if isinstance(rng, torch.Generator):
        return x + torch.rand(1, generator=rng)
    return x + (rng.random() if not isinstance(rng, np.random.RandomState) else rng.rand())


def in_a_closure() -> Callable[[Tensor], Tensor]:
    rng = np.random.RandomState(0)
    return lambda x: add_noise(x, rng)


OWN_RNG: dict[str, Callable[[], Dataset[Any]]] = {
    "random.Random": lambda: Noisy(Noise(random.Random(0))),
    "RandomState": lambda: Noisy(Noise(np.random.RandomState(0))),
    "numpy Generator": lambda: Noisy(Noise(np.random.default_rng(0))),
    "torch Generator": lambda: Noisy(Noise(torch.Generator().manual_seed(0))),
    "composed": lambda: Noisy(Compose(Noise(random.Random(0)), Compose(Noise(np.random.RandomState(1))))),
    "subset of a subset": lambda: Subset(
        Subset(Noisy(Compose(Compose(Noise(np.random.RandomState(0))))), range(28)), range(20)
    ),
    "split": lambda: random_split(Noisy(Compose(Noise(np.random.RandomState(0)))), [20, 8])[0],
    "concatenated": lambda: ConcatDataset(
        [Noisy(Noise(np.random.RandomState(0))), Noisy(Noise(np.random.RandomState(1)))]
    ),
    "bound method": lambda: Noisy(Noise(np.random.RandomState(0)).apply),
    "partial": lambda: Noisy(functools.partial(add_noise, rng=np.random.RandomState(0))),
    "closure": lambda: Noisy(in_a_closure()),
    "slots": lambda: Noisy(Slotted(np.random.RandomState(0))),
}


@pytest.mark.parametrize("dataset", OWN_RNG)
def test_dataset_with_a_generator_of_its_own(dataset):
    assert_bit_identical(lambda: train_loader(OWN_RNG[dataset]()))


@pytest.mark.parametrize("dataset", ["RandomState", "closure"])
def test_dataset_with_a_generator_of_its_own_in_a_worker_that_lives_on(dataset):
    assert_bit_identical(lambda: train_loader(OWN_RNG[dataset](), num_workers=1, persistent_workers=True))


def test_collate_function_with_a_generator_of_its_own():
    class Jitter:
        def __init__(self) -> None:
            self.rng = np.random.RandomState(0)

        def __call__(self, items: list[Any]) -> Any:
            x, y, index = torch.utils.data.default_collate(items)
            return x + self.rng.rand(), y, index

    assert_bit_identical(lambda: train_loader(collate_fn=Jitter()))


# Iterable datasets


class Resetting(IterableDataset[Any]):
    """Its own iterator; starting anew resets it."""

    def __init__(self, seed: int = 0) -> None:
        self.data, self.position = samples(seed=seed), 0

    def __iter__(self) -> Iterator[Any]:
        self.position = 0
        return self

    def __next__(self) -> Any:
        if self.position == len(self.data):
            raise StopIteration
        self.position += 1
        return self.data[self.position - 1]


class SizedResetting(Resetting):
    """Says how long it is, as a chain asks its parts."""

    def __len__(self) -> int:
        return len(self.data)


class Buffered(IterableDataset[Any]):
    """Its own iterator, with a shuffle buffer that is changed in place."""

    def __init__(self) -> None:
        self.data, self.buffer, self.rng = samples(), [], random.Random(0)

    def __iter__(self) -> Iterator[Any]:
        self.buffer.clear()
        self.buffer.extend(range(len(self.data)))
        self.rng.shuffle(self.buffer)
        return self

    def __next__(self) -> Any:
        if not self.buffer:
            raise StopIteration
        return self.data[self.buffer.pop()]


class Wrapping(IterableDataset[Any]):
    """Transforms what another one gives."""

    def __init__(self, inner: IterableDataset[Any]) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        for x, *rest in self.inner:
            yield 2 * x, *rest


class Streaming(IterableDataset[Any]):
    """Reads on in a stream that never ends."""

    def __init__(self) -> None:
        self.data, self.at = samples(), 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.at = (self.at + 5) % 28
            yield self.data[self.at]


ITERABLE: dict[str, Callable[[], IterableDataset[Any]]] = {
    "resetting": Resetting,
    "buffered": Buffered,
    "wrapping": lambda: Wrapping(Resetting()),
    "wrapping a buffered one": lambda: Wrapping(Buffered()),
    "chained": lambda: ChainDataset([SizedResetting(), SizedResetting(seed=1)]),
}


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dataset", ITERABLE)
def test_iterable_dataset_that_starts_anew_whenever_it_is_iterated(dataset, workers):
    kwargs = {"num_workers": 1, "persistent_workers": True} if workers else {}
    # Two batches, while training is three batches into its epoch, one of them fetched in advance.
    callback = assert_bit_identical(lambda: train_loader(ITERABLE[dataset](), shuffle=False, **kwargs))
    assert callback.last.num_batches == 2


@pytest.mark.timeout(30)
@pytest.mark.parametrize("workers", [0, 1])
def test_stream_without_an_end(workers):
    callback = assert_bit_identical(
        lambda: train_loader(Streaming(), shuffle=False, num_workers=workers), limit_train_batches=5, batches=200
    )
    assert callback.last.num_batches == 5


# Where the loaders come from


def test_loaders_of_a_datamodule_that_are_made_anew_every_epoch():
    class Module(pl.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[int] = []

        def train_dataloader(self) -> Any:
            self.made.append(self.trainer.current_epoch)
            return train_loader(samples(seed=len(self.made)), num_workers=0)

        def val_dataloader(self) -> Any:
            return val_loader()

    runs, made = [], []
    for callbacks in ([], [PreciseBatchNorm(num_batches=3)]):
        module = Module()
        settings = {"reload_dataloaders_every_n_epochs": 1, "val_check_interval": 2, "num_sanity_val_steps": 0}
        runs.append(trajectory(Classifier, lambda module=module: {"datamodule": module}, *callbacks, **settings))
        made.append(module.made)
    assert made[0] == made[1] == [0, 1]
    assert runs[0][:2] == runs[1][:2]


def test_each_pass_takes_the_batches_that_an_epoch_would_start_with():
    module = Classifier()
    pl.seed_everything(1, verbose=False)
    loader = train_loader(generator=torch.Generator().manual_seed(2))
    trainer = quiet(callbacks=[PreciseBatchNorm()], max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, loader, val_loader())
    [(_, _, used)] = module.validated
    drawn = torch.cat(used)
    assert len(drawn) == 28
    assert {bits(x) for x in drawn} == {bits(x) for x, *_ in samples()}
    assert RECALIBRATED_FROM == []


class FailingOnce(Classifier):
    """Cannot make its loader, as one whose data are missing."""

    def train_dataloader(self) -> Any:
        raise Broken


@pytest.fixture
def _dataloader_as_it_is() -> Iterator[None]:
    names = ("__init__", "__setattr__", "__delattr__", "__old__init__", "__old__setattr__", "__old__delattr__")
    before = {name: vars(DataLoader).get(name) for name in names}
    yield
    for name, value in before.items():
        if value is not None:
            setattr(DataLoader, name, value)
        elif name in vars(DataLoader):
            delattr(DataLoader, name)


@pytest.mark.usefixtures("_dataloader_as_it_is")
def test_loaders_of_a_process_in_which_making_one_failed_before():
    with pytest.raises(Broken):
        quiet().fit(FailingOnce(), val_dataloaders=val_loader())
    # Lightning's record of what is set on a loader goes on from then, in a notebook for instance.
    assert "__old__setattr__" in vars(DataLoader)
    assert_bit_identical(lambda: train_loader(num_workers=1, persistent_workers=True))


class Collecting(TensorDataset):
    """Collects what is garbage in another process than its own."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.process = os.getpid()

    def __getitem__(self, index: int) -> Any:
        if os.getpid() != self.process:
            gc.collect()
        return super().__getitem__(index)


def test_workers_of_loaders_that_are_garbage_are_not_the_passes_to_end():
    gc.collect()
    gc.disable()
    try:
        kept: list[Any] = [iter(train_loader(num_workers=1, persistent_workers=True))]
        [worker] = kept[0]._workers
        next(kept[0])
        kept.append(kept)
        del kept
        quiet(max_epochs=1, callbacks=[PreciseBatchNorm(num_batches=2)]).fit(
            Classifier(), train_loader(Collecting(*samples().tensors)), val_loader()
        )
        worker.join(1)
        assert worker.is_alive()
    finally:
        gc.enable()
        # With it alive, whoever collects the garbage would wait for it for 5 s.
        worker.terminate()
        worker.join()


@pytest.mark.parametrize("persistent", [True, False])
def test_no_worker_of_the_pass_is_left(persistent):
    seen: list[int] = []

    class Workers(pl.Callback):
        def __init__(self) -> None:
            self.before = set(multiprocessing.active_children())  # those that an earlier test left to the collector

        def on_validation_batch_end(self, *args: Any) -> None:
            seen.append(len(set(multiprocessing.active_children()) - self.before))

    counts = []
    for callbacks in ([], [PreciseBatchNorm(num_batches=2)]):
        seen.clear()
        trainer = quiet(callbacks=[*callbacks, Workers()], val_check_interval=2, num_sanity_val_steps=0, max_epochs=1)
        trainer.fit(Classifier(), train_loader(num_workers=1, persistent_workers=persistent), val_loader())
        counts.append(list(seen))
        del trainer
    assert counts[0] == counts[1]


def test_workers_of_training_live_on():
    class Pids(Dataset[Any]):
        def __len__(self) -> int:
            return 28

        def __getitem__(self, index: int) -> Any:
            x, y, _ = samples()[index]
            return x, y, torch.utils.data.get_worker_info().id + multiprocessing.current_process().pid

    pids = []

    class Seen(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            pids.append(set(batch[2].tolist()))

    trainer = quiet(callbacks=[PreciseBatchNorm(num_batches=2), Seen()], val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(Classifier(), train_loader(Pids(), num_workers=1, persistent_workers=True), val_loader())
    assert len(pids) == 8
    assert len(set.union(*pids)) == 1


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).T,
        torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.ones(3, dtype=torch.bfloat16),
        torch.tensor(True),
        torch.zeros(0, 3, dtype=torch.int64),
        torch.arange(10)[2:5],
        torch.ones(2, requires_grad=True),
        nn.Parameter(torch.ones(2)),
        torch.eye(3).to_sparse(),
        torch.tensor([1 + 2j]).conj(),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.dtype}-{value.layout}",
)
def test_tensors_come_out_of_the_other_process_as_they_went_in(value):
    [found] = pickle.loads(_packed([value]))[1]
    assert type(found) is type(value)
    assert (found.dtype, found.shape, found.requires_grad) == (value.dtype, value.shape, value.requires_grad)
    assert found.layout == value.layout
    assert torch.equal(found.to_dense(), value.to_dense())
    if value.layout is torch.strided:
        assert found.stride() == value.stride()
        found.detach().zero_()


def test_a_slice_is_handed_over_without_what_lies_around_it():
    whole = torch.zeros(1_000_000)
    assert len(_packed([whole[:10]])) < 10_000
