"""The task that the running part of a step belongs to: contexts, and who is told of them."""

import pytest

import lightning_bn
from lightning_bn.functional._tasks import listen, stop_listening, task


def test_a_listener_hears_what_runs_next_whenever_a_context_begins_or_ends() -> None:
    heard: list[str | None] = []
    listen(heard.append)
    listen(heard.append)  # listening twice is listening once
    try:
        with task("det"), task("seg"):
            pass
        with pytest.raises(RuntimeError, match="as planned"), task("depth"):
            raise RuntimeError("as planned")
    finally:
        stop_listening(heard.append)
        stop_listening(heard.append)  # harmless
    with task("det"):
        pass
    assert heard == ["det", "seg", "det", None, "depth", None]


def test_the_context_is_part_of_the_public_names() -> None:
    assert lightning_bn.task is task
