"""What several files of the project say of the same thing is the same."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def of_the_project(key):
    """A text of ``[project]`` in pyproject.toml."""
    [value] = re.findall(rf'^{key} = "([^"]*)"', PYPROJECT, re.M)
    return value


def recipe(target):
    """What a target of the Makefile runs, without make's own marks."""
    [lines] = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    return lines.replace("\t@", "").replace("$(BIN)/", ".venv/bin/")


def test_the_citation_has_the_version_the_license_and_the_authors_of_the_package():
    assert CITATION["version"] == of_the_project("version")
    assert CITATION["license"] == of_the_project("license")
    assert [author["name"] for author in CITATION["authors"]] == re.findall(
        r'authors = \[\{ name = "([^"]+)"', PYPROJECT
    )


def test_the_citation_has_what_its_format_asks_for():
    required = {"cff-version", "message", "title", "authors"}
    assert required <= set(CITATION) <= {*required, "abstract", "keywords", "license", "type", "version"}
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"


def test_hooks_before_a_commit_run_what_make_lint_runs():
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = [hook["entry"] for hook in local["hooks"]]
    # make gives ruff the whole folder, a hook the files of the commit
    commands = re.findall(r"^(\.venv/bin/.*?)(?: \.)?(?: \|\|.*)?$", recipe("lint"), re.M)
    assert local["repo"] == "local"  # the tools that constraints.txt pins
    assert len(hooks) == 3
    assert sorted(hooks) == sorted(commands)


def test_each_dependency_is_pinned():
    body = PYPROJECT.split("[project.optional-dependencies]")
    tables = body[0].split("\ndependencies = [")[1] + body[1].split("\n[")[0]
    named = {name.lower() for name in re.findall(r'"([A-Za-z][\w-]*)[^"]*"', tables)} - {"lightning-bn"}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert {"torch", "mypy", "pytest-cov", "mkdocstrings"} <= named
    assert named - {name.lower().replace("_", "-") for name in pinned} == set()


def test_contributing_lists_what_can_be_made():
    targets = set(re.findall(r"^([a-z-]+):.*?## ", MAKEFILE, re.M)) - {"help"}
    [phony] = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)
    assert set(phony.split()) == targets | {"help"}
    rows = "".join(line for line in CONTRIBUTING.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`make ([a-z-]+)`", rows)) == targets


def test_contributing_lists_the_rooms():
    layout = CONTRIBUTING.split("## Layout")[1].split("```")[1]
    folders = [
        f"{file.parent.name}/"
        for floor in ("functional", "callbacks")
        for file in (ROOT / "lightning_bn" / floor).glob("*/__init__.py")
    ]
    assert sorted(re.findall(r"^    (\w+/)", layout, re.M)) == sorted(folders)


def test_what_must_hold_before_a_merge_ends_with_the_tests():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make docs", "make test"]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_a_form_asks_for_each_thing_once(form):
    asked = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(asked)
    ids = [field["id"] for field in asked["body"]]
    labels = [field["attributes"]["label"] for field in asked["body"]]
    assert len(set(ids)) == len(ids) > 0
    assert len(set(labels)) == len(labels)
    assert {field["type"] for field in asked["body"]} <= {"textarea", "input", "dropdown", "checkboxes"}


def test_a_bug_report_has_what_one_needs_to_see_the_bug():
    body = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8"))["body"]
    required = {field["id"] for field in body if field["validations"]["required"]}
    assert required == {"what", "code", "callbacks", "layers", "versions", "strategy"}


def networks(files):
    """By name, the files that define a module of torch or Lightning of that name at their top level."""
    found, kinds = {}, {"Module", "LightningModule"}
    classes = [
        (file, node) for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)
    ]
    while True:
        more = [
            (file, node)
            for file, node in classes
            if kinds & {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        ]
        if {node.name for _, node in more} <= kinds:
            break
        kinds |= {node.name for _, node in more}
    for file, node in more:
        found.setdefault(node.name, []).append(file.name)
    return found


def test_networks_of_the_tests_have_a_name_each():
    found = networks(sorted((ROOT / "tests").rglob("*.py")))
    assert {"SmallResNet", "BodyAndHead", "Classifier", "PretrainedClassifier"} <= set(found)
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


def test_two_networks_of_one_name_are_seen(tmp_path):
    (tmp_path / "one.py").write_text("class Net(nn.Module): ...\nclass Data: ...\n")
    (tmp_path / "two.py").write_text("class Base(pl.LightningModule): ...\nclass Net(Base): ...\nclass Data: ...\n")
    found = networks([tmp_path / "one.py", tmp_path / "two.py"])
    assert found == {"Net": ["one.py", "two.py"], "Base": ["two.py"]}
