"""A forward that is watched: in which order BatchNorm layers run, on what input, and what dropout did to it before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_bn.functional.doctor.traces import Behind, Dropout, Origin, Trace, Use
from lightning_bn.functional.layers.names import named_paths
from lightning_bn.functional.layers.properties import has_running_statistics, processes_of

_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
_ATTENTION = {F.multi_head_attention_forward: 10, F.scaled_dot_product_attention: 4}
"""Which apply dropout inside, and where its probability stands."""
_NORMALIZATIONS = {F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, torch.batch_norm}
_WITH_WEIGHTS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_BIASED = (nn.Linear, nn.modules.conv._ConvNd)


class SingleValueError(Exception):
    """A layer in train mode was given one value per channel, of which there is no variance."""


def traced(
    model: nn.Module,
    layers: Mapping[str, _BatchNorm],
    run: Callable[[], Any],
    *,
    without_dropout: bool = False,
    follow: frozenset[str] = frozenset(),
) -> Trace:
    """Return what a forward did.

    Args:
        model: Whose modules are watched.
        layers: Its BatchNorm layers.
        run: Runs the forward.
        without_dropout: Whether dropout leaves its input as it is; random numbers are drawn all the same, so that
            whatever else draws some gets the same ones.
        follow: Names of layers whose outputs are followed to the layers that they go into.
    """
    watch = _Watch(without_dropout, follow)
    single: str | None = None
    with watch.hooked(model, layers), watch:
        try:
            output = run()
        except SingleValueError as error:
            single = str(error)
        else:
            watch.count_kept()
            del output
    return Trace({name: tuple(uses) for name, uses in watch.uses.items()}, tuple(watch.dropouts), single)


class _Watch(TorchFunctionMode):
    """Sees each call of a function of torch, and by hooks where in the model it happens."""

    def __init__(self, without_dropout: bool, follow: frozenset[str]) -> None:
        super().__init__()
        self.uses: dict[str, list[Use]] = {}
        self.dropouts: list[Dropout] = []
        self._without, self._follow, self._inside = without_dropout, follow, [""]
        self._by_name: dict[str, nn.Module] = {}
        # Of tensors that live; each record goes with its tensor.
        self._behind: Any = WeakTensorKeyDictionary()
        self._origins: Any = WeakTensorKeyDictionary()
        self._looking = False

    @contextmanager
    def hooked(self, model: nn.Module, layers: Mapping[str, _BatchNorm]) -> Iterator[None]:
        """Inside, it is told where in the model the forward is."""
        names = {id(layer): name for name, layer in layers.items()}
        first: dict[int, tuple[str, nn.Module]] = {}
        for name, module in named_paths(model):
            first.setdefault(id(module), (name, module))
        with ExitStack() as stack:
            for name, module in first.values():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                own = names.get(id(module), name)
                self._by_name[own] = module
                enter = module.register_forward_pre_hook(partial(self._enter, own), with_kwargs=True)
                leave = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            yield

    def count_kept(self) -> None:
        """Count what is still there after the forward as read: in its output, or kept on a module."""
        for origin in self._origins.values():
            origin.reads += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._looking:
            return func(*args, **kwargs)
        given = [value for value in _flat((args, kwargs)) if isinstance(value, Tensor)]
        behind = Behind()
        for tensor in given:
            behind = behind.merged(self._behind.get(tensor))
        origins = [origin for tensor in given if (origin := self._origins.get(tensor)) is not None]
        dropout = self._dropout(func, args, kwargs)
        output = self._run(func, args, kwargs, given, ends=dropout is not None and self._without)
        if dropout is not None and not self._without:
            self.dropouts.append(dropout)
            behind = behind.merged(Behind(frozenset({dropout}), frozenset({dropout})))
        if func in _NORMALIZATIONS:
            behind = Behind(after=behind.after)
        elif func in _WITH_WEIGHTS:
            behind = behind._replace(directly=frozenset())
        put_out = [value for value in _flat(output) if isinstance(value, Tensor)]
        for origin in origins if put_out else ():
            origin.reads += 1
        for tensor in put_out:
            # A tensor that was written to may have had another one.
            if any(behind) or tensor in self._behind:
                self._behind[tensor] = behind
            if func in _WITH_WEIGHTS and self._has_bias():
                self._origins[tensor] = Origin(self._inside[-1])
        return output

    @staticmethod
    def _run(func: Any, args: Any, kwargs: Any, given: list[Tensor], *, ends: bool) -> Any:
        """What a function puts out; where dropout is to do nothing, what it puts out without."""
        if not ends:
            return func(*args, **kwargs)
        if func in _ATTENTION:
            place = _ATTENTION[func]
            if len(args) > place:
                return func(*args[:place], 0.0, *args[place + 1 :], **kwargs)
            return func(*args, **{**kwargs, "dropout_p": 0.0})
        kept = given[0].clone()
        func(*args, **kwargs)
        # Also where it was to be done in place.
        return given[0].copy_(kept) if kwargs.get("inplace") else kept

    def _has_bias(self) -> bool:
        module = self._by_name.get(self._inside[-1])
        return isinstance(module, _BIASED) and module.bias is not None

    def _dropout(self, func: Any, args: Any, kwargs: Any) -> Dropout | None:
        """The dropout that a call applies; None if it applies none."""
        if func in _ATTENTION:
            place = _ATTENTION[func]
            p = args[place] if len(args) > place else kwargs.get("dropout_p", 0.0)
            return (
                Dropout(self._inside[-1], float(p), func.__name__) if p > 0 and kwargs.get("training", True) else None
            )
        if func not in _DROPOUTS:
            return None
        p = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
        return Dropout(self._inside[-1], float(p), func.__name__) if training and p > 0 else None

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append(name)
        given = [value for value in _flat((args, kwargs)) if isinstance(value, Tensor)]
        if isinstance(module, _BatchNorm) and given and given[0].dim() > 1:
            self._looking = True
            try:
                self._see(name, module, given[0])
            finally:
                self._looking = False

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._inside.pop()
        if name in self._follow and isinstance(output, Tensor):
            of_output = self._behind.get(output, Behind())
            self._behind[output] = of_output.merged(Behind(after=frozenset({name})))

    def _see(self, name: str, layer: _BatchNorm, batch: Tensor) -> None:
        values = batch.detach().movedim(1, 0).flatten(1)
        values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        if layer.training and values.shape[1] == 1 and processes_of(layer) == 1:
            raise SingleValueError(name)
        none = values.shape[1] == 0
        var, mean = [values.new_zeros(len(values))] * 2 if none else torch.var_mean(values, 1, correction=0)
        updates = not none and layer.training and layer.track_running_stats and has_running_statistics(layer)
        use = Use(
            sum(map(len, self.uses.values())),
            layer.training,
            updates and layer.momentum != 0,
            values.shape[1],
            mean.cpu().double(),
            var.cpu().double(),
            _independent_channels(batch),
            self._behind.get(batch, Behind()),
            self._origins.get(batch),
        )
        self.uses.setdefault(name, []).append(use)


def _independent_channels(batch: Tensor) -> float:
    """As how many independent channels those of a layer's input vary: C**2 / sum(r**2) of their correlations r.

    A mean over the squares of correlated normal variables is distributed nearly as one over so many independent ones
    (the approximation of Satterthwaite). Of few samples correlations come out too high, which is taken out.
    """
    samples = batch.detach().double().flatten(2).mean(2) if batch.dim() > 2 else batch.detach().double()
    count = len(samples)
    centered = samples - samples.mean(0)
    scale = centered.square().sum(0).sqrt()
    z = centered[:, scale > 0] / scale[scale > 0]
    channels = z.shape[1]
    if count < 3 or channels < 2:
        return 1.0
    squares = float((z.T @ z if channels < count else z @ z.T).square().sum())
    pairs = channels * (channels - 1)
    adjusted = pairs - (pairs + channels - squares) * (count - 1) / (count - 2)
    return channels**2 / (channels + min(max(adjusted, 0.0), pairs)) if math.isfinite(squares) else 1.0


def _flat(value: Any) -> Iterator[Any]:
    """What lies in tuples, lists and dicts, however deep."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for one in value:
            yield from _flat(one)
    else:
        yield value
