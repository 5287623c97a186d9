"""State dicts hold the default task's statistics wherever they are taken or loaded, inside a task's context too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from lightning_bn.functional.layers.torch_private import buffers_of
from lightning_bn.functional.tasks.task_sets import Buffers


class DefaultInStateDicts:
    """Hooks on layers that have other tensors in their place for a while.

    Args:
        layers: By name.
        own: Returns the layers' own tensors by name while others are in their place, else None.
        loaded: Called when a layer's own tensors have been loaded.
    """

    def __init__(
        self,
        layers: Mapping[str, _BatchNorm],
        own: Callable[[], Mapping[str, Buffers] | None],
        loaded: Callable[[], None],
    ) -> None:
        self._handles: list[RemovableHandle] = []
        for name, layer in layers.items():
            hooks = _Hooks(layer, name, own, loaded)
            self._handles += [
                layer.register_state_dict_post_hook(_Call(hooks, "saved")),
                layer.register_load_state_dict_pre_hook(_Call(hooks, "before_loading")),
                layer.register_load_state_dict_post_hook(_Call(hooks, "after_loading")),
            ]

    def remove(self) -> None:
        """Leave no trace."""
        for handle in self._handles:
            handle.remove()


class _Hooks:
    def __init__(
        self, layer: nn.Module, name: str, own: Callable[[], Mapping[str, Buffers] | None], loaded: Callable[[], None]
    ) -> None:
        self._layer, self._name, self._own, self._loaded = layer, name, own, loaded
        self._in_place: dict[str, Any] = {}

    def saved(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        own = self._own() if module is self._layer else None
        if own is not None:
            for key, buffer in own[self._name].items():
                if prefix + key in state_dict:
                    state_dict[prefix + key] = buffer.detach()

    def before_loading(self, module: nn.Module, state_dict: Any, prefix: str, metadata: Any, *_: Any) -> None:
        own = self._own() if module is self._layer else None
        if own is not None:
            if metadata.get("assign_to_params_buffers"):
                raise RuntimeError(
                    "load_state_dict(assign=True) inside the context of a task would replace the wrong tensors of "
                    f"BatchNorm layer {self._name!r}: load after the context."
                )
            self._in_place = dict(buffers_of(module))
            buffers_of(module).update(own[self._name])

    def after_loading(self, module: nn.Module, _: Any) -> None:
        if module is self._layer:
            buffers_of(module).update(self._in_place)
            self._in_place = {}
            self._loaded()


class _Call:
    """A method of hooks, as an object that a copy or a pickle of the layer does not take along."""

    def __init__(self, hooks: _Hooks | None = None, method: str = "") -> None:
        self._hooks, self._method = hooks, method

    def __call__(self, *args: Any) -> None:
        if self._hooks is not None:
            getattr(self._hooks, self._method)(*args)

    def __deepcopy__(self, memo: object) -> _Call:
        return _Call()

    def __reduce__(self) -> tuple[type[_Call], tuple[()]]:
        return (_Call, ())
