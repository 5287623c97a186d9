"""What a batch is made of: its tensors moved to a device, its samples counted, a model fed with it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def model_device(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer, the CPU for a model without either."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on ``device``; lists, tuples, named tuples and mappings are followed."""
    # What knows how to move itself first: tensors, packed sequences, tokenizers' encodings, graphs.
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    return _with_each(batch, lambda value: to_device(value, device))


def copied_batch(batch: Any) -> Any:
    """A copy of a batch, to which a forward may do what it likes: as deep as it goes, tensors without their history."""
    # Those that a copy would refuse: with a history, or made under inference_mode.
    tensors = {id(tensor): _copied_tensor(tensor) for tensor in tensors_in(batch)}
    try:
        return copy.deepcopy(batch, dict(tensors))
    except Exception:  # something in it has no copy, which is given as it is
        return _with_copies(batch, tensors)


def _with_copies(batch: Any, tensors: Mapping[int, Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return tensors[id(batch)]
    if isinstance(batch, Mapping | list | tuple):
        return _with_each(batch, lambda value: _with_copies(value, tensors))
    try:
        return copy.deepcopy(batch)
    except Exception:
        return batch


def _copied_tensor(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors in a batch; lists, tuples and mappings are followed."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_in(value)


def _with_each(batch: Any, of: Callable[[Any], Any]) -> Any:
    """A collection of the same kind, with what a function makes of each value; what is none as it is."""
    if isinstance(batch, Mapping):
        made = {key: of(value) for key, value in batch.items()}
        try:
            return type(batch)(made)  # type: ignore[call-arg]
        except TypeError:
            return made
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(of, batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map(of, batch))
    return batch


def num_samples(batch: Any) -> int | None:
    """The leading dimension of the first tensor in the batch; None if there is no such tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((count for value in values if (count := num_samples(value)) is not None), None)


def batches_in(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of a loader; of Lightning's CombinedLoader, which gives each with two numbers, without these."""
    # By name: nothing of Lightning is known here, and each of its two namespaces has a class of its own.
    if any(base.__name__ == "CombinedLoader" for base in type(batches).__mro__):
        return (batch for batch, _, _ in batches)
    return iter(batches)


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on a tensor, on the first element of a tuple or list, or with the items of a dict as keywords.

    Raises:
        TypeError: If the batch is none of these, or the model's forward does not take the keys of the dict.
    """
    keys: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    values = [batch] if isinstance(batch, Tensor) else list(batch[:1]) if isinstance(batch, list | tuple) else []
    if isinstance(batch, Mapping) or (values and isinstance(values[0], Tensor)):
        try:
            # Of a compiled model, that of the module inside; TorchScript has none.
            if not isinstance(model, torch.jit.ScriptModule):
                inspect.signature(getattr(model, "_orig_mod", model).forward).bind(*values, **keys)
        except TypeError as error:
            given = f"the keys {sorted(map(str, batch))} of the batch" if isinstance(batch, Mapping) else "one tensor"
            raise TypeError(
                f"{type(model).__name__}.forward cannot be called with {given} ({error}): pass "
                f"forward=lambda model, batch: ... that calls the model on it."
            ) from error
        return model(*values, **keys)
    raise TypeError(
        f"a batch is {describe_batch(batch)}; without forward= the model takes a tensor, a tuple or list that starts "
        "with one, or a dict of keywords: pass forward=lambda model, batch: ... that calls the model on it."
    )


def describe_batch(batch: Any) -> str:
    """The type of a batch and of what it starts with, for an error."""
    inner = f" that starts with {type(batch[0]).__name__}" if isinstance(batch, list | tuple) and batch else ""
    return f"{type(batch).__name__}{inner}"
