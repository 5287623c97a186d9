"""Objects that run, or stand for something that does, and of which there is no second one: threads, locks, queues."""

from __future__ import annotations

import concurrent.futures
import multiprocessing.connection
import multiprocessing.process
import multiprocessing.queues
import queue
import socket
import subprocess
import threading
from typing import Any

SHARED = (
    queue.Queue,
    queue.SimpleQueue,
    multiprocessing.queues.Queue,
    multiprocessing.queues.SimpleQueue,
    multiprocessing.connection.Connection,
    socket.socket,
    subprocess.Popen,
)
LOCKS = (
    threading.Condition,
    threading.Event,
    threading.Semaphore,
    threading.Barrier,
    type(threading.Lock()),
    type(threading.RLock()),
)
_RUNNING = (threading.Thread, multiprocessing.process.BaseProcess, concurrent.futures.Executor)
_TOLD = (
    "logging",
    "tensorboard",
    "torch.utils.tensorboard",
    "wandb",
    "mlflow",
    "comet_ml",
    "neptune",
    "clearml",
    "aim",
)
"""Packages of what is told something, and not drawn from."""


def is_service(value: Any) -> bool:
    """Whether it runs, or stands for something that does: it has whatever it holds for itself, and cannot be copied."""
    module = type(value).__module__
    return isinstance(value, (*_RUNNING, *LOCKS, *SHARED)) or any(
        module == name or module.startswith(f"{name}.") for name in _TOLD
    )
