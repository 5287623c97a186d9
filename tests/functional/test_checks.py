"""Arguments are refused with their name, the value found and what is wanted."""

import pytest

from lightning_bn.functional._checks import check_choice, check_positive, check_whole


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", True, None, float("nan")])
def test_what_is_no_whole_number_from_one_on_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match="num_batches=") as caught:
        check_whole("num_batches", value, 1)
    assert repr(value) in str(caught.value)
    assert "a whole number, 1 or more" in str(caught.value)


def test_none_is_allowed_where_it_means_something_and_the_error_says_what() -> None:
    check_whole("num_batches", None, 1, none="for all")
    check_positive("threshold", None, none="for no threshold")
    with pytest.raises(ValueError, match="or None for all"):
        check_whole("num_batches", 0, 1, none="for all")


@pytest.mark.parametrize("value", [0, -0.5, "1", True, float("nan")])
def test_what_is_not_positive_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"warn_above=.* must be a positive number"):
        check_positive("warn_above", value)


def test_numbers_that_are_right_pass() -> None:
    check_whole("start_epoch", -20)
    check_whole("num_batches", 1, 1)
    check_positive("warn_above", 1)
    check_choice("measure", "jeffreys", ("jeffreys", "output"))


def test_what_is_no_choice_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"measure='jefreys' must be one of jeffreys, output"):
        check_choice("measure", "jefreys", ("jeffreys", "output"))
    with pytest.raises(ValueError, match=r"measure=\['jeffreys'\]"):
        check_choice("measure", ["jeffreys"], ("jeffreys", "output"))
