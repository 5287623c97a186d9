"""The context that says which task a part of a step belongs to."""

import pytest

from lightning_bn.functional._tasks import listen, stop_listening, task


def test_context_that_a_listener_refuses_leaves_no_task_behind():
    told = []

    def refuse(name: str | None) -> None:
        told.append(name)
        if name == "unknown":
            raise ValueError(name)

    listen(refuse)
    try:
        with pytest.raises(ValueError, match="unknown"), task("unknown"):
            pass
        with task("seg"):
            pass
    finally:
        stop_listening(refuse)

    assert told == ["unknown", None, "seg", None]
