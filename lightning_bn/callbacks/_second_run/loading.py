"""Batches loaded by a process of its own: what loading does to datasets, samplers and generators stays there."""

from __future__ import annotations

import gc
import io
import multiprocessing
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_bn.callbacks._lightning.namespaces import MisconfigurationException
from lightning_bn.callbacks._second_run.drawn_once import CHOICES
from lightning_bn.functional._bits import is_plain

_OF_NUMPY = {torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool}
_OF_NUMPY |= {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_PATIENCE = 10.0
"""Seconds in which the process and its workers may end by themselves."""

Opened = Callable[[], AbstractContextManager[Iterator[Any]]]


def can_fork() -> bool:
    """Whether this process may have a copy of itself load the batches: not on Windows and macOS, not in a daemon."""
    forks = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    return forks and not multiprocessing.current_process().daemon


@contextmanager
def loaded_apart(opened: Opened) -> Iterator[Generator[Any, None, None]]:
    """Yield the batches that ``opened`` gives in a forked copy of this process; this one never touches the loaders.

    Args:
        opened: Called in the other process: a context that gives an iterator of batches.

    Raises:
        MisconfigurationException: If batches cannot be handed from one process to another, or the process dies.
    """
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_serve, args=(opened, here, there), daemon=False)
    process.start()
    there.close()
    try:
        yield _received(here, process)
    finally:
        # The process sees the end of the pipe, and ends with its workers.
        here.close()
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


def _received(connection: Connection, process: Any) -> Generator[Any, None, None]:
    kind = ""
    while kind != "end":
        try:
            # One more is loaded while this one is used.
            connection.send_bytes(b"")
            received = connection.recv_bytes()
        except (EOFError, ConnectionError) as error:
            process.join(_PATIENCE)
            raise MisconfigurationException(
                f"PreciseBatchNorm: the process that loaded the batches ended with exit code {process.exitcode} (a "
                "negative code is a signal: -7 means that shared memory was full, -9 often that memory was). "
                f"{CHOICES}"
            ) from error
        kind, value = pickle.loads(received)
        if kind == "error":
            raise value
        if kind == "batch":
            yield value


def _serve(opened: Opened, other: Connection, connection: Connection) -> None:
    """Answer each message with a batch, in the forked process, until nobody listens any more."""
    other.close()
    # What is garbage there is not collected here: the iterator of another loader would end that process's workers.
    gc.freeze()
    _be_quiet()
    with suppress(EOFError, ConnectionError), closing(_replies(opened)) as replies:
        for reply in replies:
            connection.recv_bytes()
            connection.send_bytes(reply)
        # What was handed over in shared memory is fetched from this process: it stays.
        connection.recv_bytes()


def _replies(opened: Opened) -> Generator[Any, None, None]:
    """Yield what is sent: batches, and at last that there are no more, or an error, whatever its kind."""
    try:
        with opened() as batches:
            for batch in batches:
                yield _packed(batch)
        yield pickle.dumps(("end", None))
    except Exception as error:
        yield _packed_error(error)


def _packed(batch: Any) -> Any:
    # What workers put into shared memory is handed on; nothing else is put there, which may be small.
    tensors = [value for value in tree_leaves(batch) if isinstance(value, Tensor)]
    shared = any(tensor.layout is torch.strided and tensor.is_shared() for tensor in tensors)
    dumps: Callable[[Any], Any] = ForkingPickler.dumps if shared else _dumps
    try:
        return dumps(("batch", batch))
    except Exception as error:
        raise MisconfigurationException(
            "PreciseBatchNorm: the second pass over the training loaders runs in another process, and its batches "
            f"cannot be sent from there ({type(error).__name__}: {error}). {CHOICES}"
        ) from error


class _Pickler(pickle.Pickler):
    """Writes the values of a tensor alone, where torch would write a file of all that lies in its storage."""

    def reducer_override(self, obj: Any) -> Any:
        """As :class:`pickle.Pickler` has it."""
        plain = type(obj) is Tensor and obj.device.type == "cpu" and not obj.requires_grad and obj.is_contiguous()
        if plain and is_plain(obj) and obj.dtype in _OF_NUMPY:
            return torch.from_numpy, (obj.numpy(),)
        return NotImplemented


def _dumps(value: Any) -> bytes:
    written = io.BytesIO()
    _Pickler(written, pickle.HIGHEST_PROTOCOL).dump(value)
    return written.getvalue()


def _packed_error(error: BaseException) -> bytes:
    if hasattr(error, "add_note"):  # Python 3.11
        trace = "".join(traceback.format_exception(error))
        error.add_note(f"Raised in the process that loads the batches of a recalibration:\n{trace}{CHOICES}")
    try:
        packed = pickle.dumps(("error", error))
        pickle.loads(packed)
    except Exception:
        return pickle.dumps(("error", RuntimeError(f"{type(error).__name__}: {error}")))
    return packed


def _be_quiet() -> None:
    """Leave signals to the process that this one is a copy of, and use one thread, as workers do."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
