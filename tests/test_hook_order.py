"""docs/hook_order.md says who acts when; a fit says the same."""

from pathlib import Path

import pytest

from tests.hook_order import FIGURE, Event, drawn, recorded, rows, table

PAGE = Path(__file__).parent.parent / "docs" / "hook_order.md"
AGAIN = "run python -m tests.hook_order"


def test_the_page_and_its_figure_say_what_a_fit_does(tmp_path: Path) -> None:
    events, columns = recorded(tmp_path)
    found = rows(events)
    assert table(found) == PAGE.read_text(encoding="utf-8").split("## The same as a table\n\n")[1].strip(), AGAIN
    assert drawn(found, columns) == FIGURE.read_text(encoding="utf-8"), AGAIN


def test_a_hook_that_is_called_in_another_order_the_second_time_is_seen() -> None:
    first = [Event("each batch", "on_train_batch_start", who) for who in ("A", "B")]
    step = Event("each batch", "training_step", "")
    assert [row.who for row in rows([*first, step, *first])] == [("A", "B"), ()]
    with pytest.raises(AssertionError, match="differs"):
        rows([*first, step, *first[::-1]])
