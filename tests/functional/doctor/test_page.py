"""The page on the doctor has a row for each rule, with what the code says of it."""

from pathlib import Path

from lightning_bn.callbacks._doctor.all_rules import FIT_RULES
from lightning_bn.functional.doctor.all_rules import RULES, Rule
from lightning_bn.functional.doctor.dropout import NOTICEABLE, SHIFTED
from lightning_bn.functional.doctor.reach import CHANCE, DIFFERENT, UNLIKE

PAGE = Path(__file__).parents[3] / "docs" / "doctor.md"


def row(rule: Rule) -> str:
    return f"| `{rule.name}` | {rule.finds} | {rule.severity} | {rule.needs} |"


def test_the_table_lists_every_rule_as_the_code_has_it() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Rules")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert rows == [row(rule) for rule in (*RULES, *FIT_RULES)]


def test_names_of_rules_are_told_apart() -> None:
    names = [rule.name for rule in (*RULES, *FIT_RULES)]
    assert len({*names}) == len(names) > 20


def test_the_page_has_the_numbers_that_the_rules_decide_by() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## What it decides by")[1].split("\n## ")[0].replace("\n  ", " ")
    assert f"a factor of {NOTICEABLE} or more" in section
    assert f"the factor is {SHIFTED} or more" in section
    assert f"further apart than {UNLIKE} standard deviations" in section
    assert f"(in 1 of {1 / CHANCE:,.0f} diagnoses). From {DIFFERENT} standard deviations" in section.replace(
        "\n  ", " "
    )


def test_the_readme_counts_the_rules() -> None:
    text = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"[{len(RULES) + len(FIT_RULES)} rules](docs/doctor.md)" in text
