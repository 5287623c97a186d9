"""What the oldest supported versions do not know yet, asked of the functions themselves."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import pytorch_lightning as pl


def knows(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def reading(ckpt_path: Any) -> dict[str, Any]:
    """Arguments of ``Trainer.fit`` that resume from a file of which nothing is executed, where Lightning can."""
    if ckpt_path is None:
        return {}
    safely = {"weights_only": True} if knows(pl.Trainer.fit, "weights_only") else {}
    return {"ckpt_path": ckpt_path, **safely}


def warns_of_eval_mode() -> AbstractContextManager[Any]:
    """What Lightning says of modules that are in eval mode as a fit starts; older versions say it elsewhere."""
    if not hasattr(pl.loops.fit_loop._FitLoop, "_warn_if_modules_in_eval_mode"):
        return nullcontext()
    return pytest.warns(UserWarning, match="in eval mode")


def skip_without(function: Callable[..., Any], parameter: str) -> None:
    """Skip the test where a function does not know a parameter yet."""
    if not knows(function, parameter):
        pytest.skip(f"{function.__qualname__} has no {parameter} here")
