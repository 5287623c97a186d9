"""A set of running statistics for each task of a network, in layers that stay what they are.

Switched by contexts, compared with each other, saved beside the model's own state.
"""

from lightning_bn.functional._tasks import task
from lightning_bn.functional.tasks.bank import TaskStatistics
from lightning_bn.functional.tasks.creation import task_statistics
from lightning_bn.functional.tasks.drift import TaskDrift, task_drift
from lightning_bn.functional.tasks.export import export_task
from lightning_bn.functional.tasks.in_file import TasksInFile, tasks_in_file
from lightning_bn.functional.tasks.nearest import NearestTask, nearest_task
from lightning_bn.functional.tasks.session import TaskSession, UnlabelledBatchError

__all__ = [
    "NearestTask",
    "TaskDrift",
    "TaskSession",
    "TaskStatistics",
    "TasksInFile",
    "UnlabelledBatchError",
    "export_task",
    "nearest_task",
    "task",
    "task_drift",
    "task_statistics",
    "tasks_in_file",
]
