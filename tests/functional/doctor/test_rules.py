"""Each rule finds the model that has the fault, with its layers, and not the one that has it not."""

import pytest
from torch import nn

from lightning_bn import functional
from lightning_bn.functional import Finding, diagnose
from lightning_bn.functional.doctor.all_rules import RULES
from tests.functional.doctor.cases import CASES, Case, Patient, values

BY_NAME = [pytest.param(case, id=f"{case.rule} {case.name}".strip()) for case in CASES]


def found(patient: Patient, rule: str = "") -> list[Finding]:
    """What is said of a patient, by one rule or by all."""
    every = diagnose(patient.model, patient.batch, more_batches=patient.more)
    return [finding for finding in every if not rule or finding.rule == rule]


@pytest.mark.parametrize("case", BY_NAME)
def test_the_fault_is_found_in_its_layers(case: Case) -> None:
    patient = case.ill()
    [finding] = found(patient, case.rule)
    assert finding.severity == case.severity
    assert finding.layers == (patient.layers or finding.layers) != ()
    assert all(name in dict(patient.model.named_modules()) for name in finding.layers)


@pytest.mark.parametrize("case", BY_NAME)
def test_a_model_without_the_fault_is_not_accused_of_it(case: Case) -> None:
    assert found(case.well(), case.rule) == []


@pytest.mark.parametrize("case", BY_NAME)
def test_a_finding_says_what_why_and_what_to_do(case: Case) -> None:
    [finding] = found(case.ill(), case.rule)
    assert finding.what.endswith(".")
    assert finding.what.count(". ") == 0  # one sentence
    assert finding.why.endswith((".", ".)"))
    assert "(" in finding.remedy or "=" in finding.remedy  # code, not a lecture
    assert str(finding).startswith(f"{finding.severity}: {finding.what}")
    assert finding.as_dict()["layers"] == list(finding.layers)


def test_each_rule_has_a_case() -> None:
    assert {case.rule for case in CASES} == {rule.name for rule in RULES}


def test_each_finding_has_a_severity_that_its_rule_announces() -> None:
    said = {rule.name: rule.severity for rule in RULES}
    assert all(case.severity in said[case.rule] for case in CASES)
    both = {case.rule for case in CASES if "or" in said[case.rule]}
    assert all({case.severity for case in CASES if case.rule == name} == {"fault", "advice"} for name in both)


@pytest.mark.parametrize("case", [case for case in BY_NAME if case.values[0].ill().batch is not None])  # type: ignore[union-attr]
def test_rules_that_need_a_batch_say_nothing_without_one(case: Case) -> None:
    needs = {rule.name: rule.needs for rule in RULES}
    assert needs[case.rule] == "batch"
    assert [finding for finding in diagnose(case.ill().model) if finding.rule == case.rule] == []


def test_faults_come_before_advice() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    severities = [finding.severity for finding in diagnose(net, values())]
    assert severities == ["fault", "advice"]


def test_a_model_without_batch_norm_has_nothing() -> None:
    assert diagnose(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), values()) == []


def test_a_remedy_freezes_what_it_names() -> None:
    case = next(case for case in CASES if case.rule == "frozen-by-requires-grad")
    patient = case.ill()
    [finding] = found(patient, case.rule)
    exec(finding.remedy.split("# or without Lightning:\n")[1], {**vars(functional), "model": patient.model})
    assert found(patient, case.rule) == []


def test_another_remedy_makes_the_fault_go() -> None:
    patient = Patient(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)))
    [finding] = found(patient)
    patient.model[0] = eval(finding.remedy.splitlines()[-1], {"BatchNorm1d": nn.BatchNorm1d})
    assert found(patient) == []
