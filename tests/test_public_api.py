"""What is public is written down: a break is a difference that a reviewer sees."""

import inspect
import pickle

import pytest

import lightning_bn
from lightning_bn import functional
from tests import public_api


def test_public_signatures_are_those_written_down() -> None:
    written = public_api.FILE.read_text().splitlines()
    found = public_api.signatures()
    assert {"added": sorted({*found} - {*written}), "gone": sorted({*written} - {*found})} == {
        "added": [],
        "gone": [],
    }, "run python -m tests.public_api, and list the change in CHANGELOG.md"
    assert found == written


def test_a_changed_signature_is_seen() -> None:
    def recalibrate(model: object, batches: object, *, another: int = 0) -> None: ...

    [line] = public_api._of("lightning_bn.functional.recalibrate", recalibrate)
    assert line not in public_api.FILE.read_text().splitlines()


@pytest.mark.parametrize("name", sorted(functional.__all__))
def test_what_is_public_on_the_ground_floor_has_a_docstring_and_a_home(name: str) -> None:
    value = getattr(functional, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)
        assert value.__module__.startswith("lightning_bn.functional.")


def test_every_room_lists_what_the_floor_exports() -> None:
    rooms = [functional.layers, functional.statistics, functional.freezing, functional.recalibration]
    rooms += [functional.monitoring, functional.distributed, functional.tasks, functional.inspection]
    rooms += [functional.doctor]
    listed = [name for room in rooms for name in room.__all__]
    assert sorted(listed) == sorted(functional.__all__)
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    "name", [name for name in functional.__all__ if isinstance(getattr(functional, name), type) and "Error" in name]
)
def test_errors_can_be_raised_caught_and_sent_to_another_process(name: str) -> None:
    kind = getattr(functional, name)
    assert issubclass(kind, Exception)
    error = pickle.loads(pickle.dumps(kind("said")))
    assert isinstance(error, kind)
    assert "said" in str(error)


def test_what_must_be_caught_is_importable_from_the_package() -> None:
    assert lightning_bn.BatchNormDriftError is functional.BatchNormDriftError
    assert set(lightning_bn.__all__) <= set(dir(lightning_bn))
