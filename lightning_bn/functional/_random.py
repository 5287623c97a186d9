"""The random number generators of this process: their states, and contexts that put them back."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Put back at the end: Python's, numpy's (where loaded) and torch's generators, CUDA's included."""
    with ExitStack() as at_the_end:
        for set_state, state in _generators():
            at_the_end.callback(set_state, state)
        yield


def generator_states() -> bytes:
    """The states of all these generators, to be compared: whoever draws a number changes them."""
    return pickle.dumps([state.numpy() if isinstance(state, Tensor) else state for _, state in _generators()])


def _generators() -> list[tuple[Callable[[Any], Any], Any]]:
    """What sets the state of each generator, and its state."""
    found: list[tuple[Callable[[Any], Any], Any]] = [(random.setstate, random.getstate())]
    if (numpy := sys.modules.get("numpy")) is not None:
        found.append((numpy.random.set_state, numpy.random.get_state()))
    found.append((torch.set_rng_state, torch.get_rng_state()))
    if torch.cuda.is_initialized():
        found += [
            (partial(torch.cuda.set_rng_state, device=i), torch.cuda.get_rng_state(i))
            for i in range(torch.cuda.device_count())
        ]
    return found
