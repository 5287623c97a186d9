"""What the doctor advises can be pasted: the Python runs, and the YAML makes what it names, in a LightningCLI too."""

import ast
import builtins
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.cli import LightningCLI
from torch import nn

import lightning_bn
from lightning_bn import Finding, diagnose, functional
from tests.callbacks.fits import quiet
from tests.callbacks.test_diagnose import FITS, Fit, Patient, batch, by_requires_grad
from tests.functional.doctor.cases import CASES, Case

OF_CASES = [pytest.param(case, id=f"{case.rule} {case.name}".strip()) for case in CASES]
OF_FITS = [pytest.param(fit, id=f"{fit.rule} {fit.name}".strip()) for fit in FITS]
OF_THE_USER = {"module_a", "module_b", "modules", "optimizer", "self", "path", "loader", "batch", "model"}
MADE_ALONE = partial(pl.Trainer, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def of(case: Case | Fit) -> Iterator[Finding]:
    """What is found of a case."""
    if isinstance(case, Fit):
        found = diagnose(*case.ill())
    else:
        patient = case.ill()
        found = diagnose(patient.model, None, patient.batch, more_batches=patient.more)
    return (finding for finding in found if finding.rule == case.rule)


def namespace(model: nn.Module, **more: Any) -> dict[str, Any]:
    return {**vars(functional), **vars(lightning_bn), **vars(nn), "torch": torch, "model": model, **more}


@pytest.mark.parametrize("case", [*OF_CASES, *OF_FITS])
def test_a_remedy_is_python_whose_names_there_are(case: Case | Fit) -> None:
    [finding] = of(case)
    statements = ast.parse(finding.remedy).body
    assert statements, "comments alone are no line that mends"
    nodes = [node for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Name)]
    made = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    known = {*namespace(nn.Module()), *vars(builtins), *OF_THE_USER, "Trainer", *made}
    known |= {"BackboneFinetuning"}
    assert {node.id for node in nodes} <= known
    assert not any(line.startswith("#") and len(line) > 90 for line in finding.remedy.splitlines())


@pytest.mark.parametrize("case", OF_CASES)
def test_each_statement_of_a_remedy_runs(case: Case, tmp_path: Path) -> None:
    [finding] = of(case)
    torch.save(case.ill().model.state_dict(), tmp_path / "weights.pt")
    for statement in ast.parse(finding.remedy).body:
        patient = case.ill()
        given = {
            "path": tmp_path / "weights.pt",
            "batch": patient.batch,
            "loader": [patient.batch],
            "Trainer": MADE_ALONE,
        }
        if "recalibrate(" in ast.unparse(statement) and patient.batch is None:
            continue  # without a batch there is nothing to recalibrate with
        code = compile(ast.Module([statement], []), "remedy", "exec")
        exec(code, namespace(patient.model, **given))


@pytest.mark.parametrize("fit", OF_FITS)
def test_the_yaml_of_a_remedy_says_what_the_python_does(fit: Fit) -> None:
    [finding] = of(fit)
    if not finding.yaml:
        # What is mended in the module's own code.
        assert "self." in finding.remedy or "load_state_dict(" in finding.remedy
        return
    [(of_trainer, settings)] = yaml.safe_load(finding.yaml).items()
    assert of_trainer == "trainer"
    for key, value in settings.items():
        if key == "callbacks":
            [described] = value
            name = described["class_path"].removeprefix("lightning_bn.")
            made = getattr(lightning_bn, name)(**described.get("init_args", {}))
            [written] = {line for line in finding.remedy.splitlines() if f"[{name}(" in line}
            [same] = eval(written, namespace(nn.Module(), Trainer=lambda callbacks: callbacks))
            assert made.state_key == same.state_key
            assert made._settings_by_name() == same._settings_by_name()
        else:
            assert f"{key}={value!r}" in finding.remedy


class Cured(Patient):
    """What a configuration makes: its backbone requires no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)


def test_the_yaml_of_the_freezer_cures_in_a_lightning_cli(tmp_path: Path) -> None:
    [finding] = [one for one in diagnose(by_requires_grad(), quiet(), batch(16)) if one.severity == "fault"]
    assert finding.rule == "frozen-by-requires-grad"
    described = yaml.safe_load(finding.yaml)
    described["trainer"] |= {"accelerator": "cpu", "logger": False}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(described))
    cli = LightningCLI(Cured, args=["--config", str(path)], run=False, save_config_callback=None)
    assert {one.severity for one in diagnose(cli.model, cli.trainer, batch(16))} <= {"advice"}


class OwnSGD(torch.optim.SGD):
    """An optimizer that is not torch's."""


@pytest.mark.parametrize("kind", [torch.optim.SGD, OwnSGD])
@pytest.mark.parametrize("rule", ["affine-under-weight-decay", "not-in-optimizer"])
def test_the_optimizer_of_a_remedy_has_the_settings_of_the_one_that_is_there(rule: str, kind: Any) -> None:
    module: Any = Patient()
    given = module.head.parameters() if rule == "not-in-optimizer" else module.parameters()
    module.configure_optimizers = lambda: kind(given, lr=0.3, weight_decay=0.2)
    [finding] = [one for one in diagnose(module, quiet()) if one.rule == rule]
    names = {"torch": torch, "OwnSGD": OwnSGD, "self": module}
    optimizer: Any = None
    for statement in ast.parse(finding.remedy.split("# or freeze")[0]).body:
        if isinstance(statement, ast.Expr):
            optimizer = eval(ast.unparse(statement), names)
        else:
            exec(ast.unparse(statement), names)
    assert type(optimizer) is kind
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.3, 0.2)
    module.configure_optimizers = lambda: optimizer
    assert [one for one in diagnose(module, quiet()) if one.rule == rule] == []
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len([*module.parameters()])
