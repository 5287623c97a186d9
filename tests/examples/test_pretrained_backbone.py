"""The example with a network that has ImageNet weights: short fits of its YAML file show what docs/results.md says."""

import importlib
import io
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn

from lightning_bn.functional import recalibrate
from tests.pages import lines

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "pretrained_backbone"
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
STEPS = 20

# What the monitor says of a backbone that is not frozen is what the example is about.
pytestmark = pytest.mark.filterwarnings("ignore:BatchNormMonitor")


@pytest.fixture(scope="module")
def example():
    """Imports a module of the example by name; it sees its neighbors as it does when run as a script."""
    sys.path.insert(0, str(EXAMPLE))
    # Fewer crops, so that the tests take less time.
    vars(importlib.import_module("photographs")).update(ROWS=3, COLUMNS=4)
    yield importlib.import_module
    sys.path.remove(str(EXAMPLE))
    for path in EXAMPLE.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope="module")
def tuning(example):
    return example("fine_tuning")


@pytest.fixture(scope="module")
def recalibrating(example):
    return example("recalibrating")


@pytest.fixture(scope="module")
def outcomes(tuning, tmp_path_factory):
    """Short fits: the heads only, BatchNorm free and frozen, and the whole network with BatchNorm frozen."""
    rows, folder = [(tuning.HEADS, False), (tuning.HEADS, True)], tmp_path_factory.mktemp("fits")
    short = {"limit_train_batches": STEPS, "limit_val_batches": 1}
    heads = tuning.run(0, folder, lambda text: None, rows, **short)
    whole = tuning.run(0, folder, lambda text: None, [(tuning.HIGH, True)], **{**short, "limit_train_batches": 2})
    return heads | whole


@pytest.fixture(scope="module")
def free(tuning, outcomes):
    """Only the heads trained, BatchNorm not frozen."""
    return outcomes[tuning.HEADS, False]


def printed(table):
    """A table as a terminal of 80 columns shows it."""
    text = io.StringIO()
    Console(width=80, file=text).print(table)
    return text.getvalue()


def test_the_network_comes_with_its_weights_and_nothing_is_downloaded(example, monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    network = example("network").PretrainedNetwork()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == 49
    seen = set(example("photographs").answers(network).tolist())
    assert {698, 985} <= seen  # a palace and a daisy, of ImageNet's classes
    assert len(seen) > 5


def test_old_answers_are_lost_with_free_batch_norm_although_no_weight_of_the_backbone_trained(free):
    assert free.weights_kept
    assert not free.before.same_bits(free.after)
    assert free.old_kept < 95
    assert len(free.history.names) == 49
    assert free.history.values()[-1].max() > 0.1


def test_old_answers_are_all_given_with_frozen_batch_norm(tuning, outcomes):
    frozen = outcomes[tuning.HEADS, True]
    assert frozen.weights_kept
    assert frozen.before.same_bits(frozen.after)
    assert frozen.old_kept == 100
    assert frozen.history.values().max() == 0
    assert frozen.accuracies["digit"] > 30


def test_weights_of_the_whole_network_train_around_frozen_layers(tuning, outcomes):
    whole = outcomes[tuning.HIGH, True]
    assert not whole.weights_kept
    assert whole.before.same_bits(whole.after)


def test_a_recalibration_on_the_crops_forgets_what_training_did_to_the_statistics(recalibrating, free, example):
    before = {name: tensor.clone() for name, tensor in free.network.state_dict().items()}
    recalibrating.recalibrated_on(free.network.train(), recalibrating.CROPS)
    given = example("photographs").answers(free.network)
    free.network.load_state_dict(before)
    old = recalibrating.old_network(recalibrating.CROPS)
    assert torch.equal(given, old.given)
    assert example("photographs").kept(given) < 50
    assert old.said.standard_error > 0.1
    assert len(old.said.layers) == 49


def test_paths_left_out_at_random_are_noticed_where_containers_train(example):
    network, crops = example("network").PretrainedNetwork().train(), example("photographs").crops()
    said = recalibrate(network.backbone, [crops[:4]])
    assert said.drew_random_numbers


def test_every_layer_is_in_one_stage(example, free):
    drifting = example("drifting")
    stages = [drifting.stage_of(name) for name in free.before.names]
    assert [stages.count(stage) for stage in drifting.STAGES] == [3, 6, 6, 18, 16]
    assert "variance x" in drifting.reading([{(None, False): free}])


def test_what_is_kept_for_the_backward_is_counted_once_and_without_parameters(example):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with example("cost").kept_for_backward(model) as storages:
        model(torch.ones(3, 4))
    # The input, and what ReLU gave, which the last layer keeps too.
    assert sum(storages.values()) == 4 * (3 * 4 + 3 * 8)


def test_memory_efficient_frozen_layers_keep_less(example, monkeypatch):
    cost = example("cost")
    monkeypatch.setattr(cost, "ROUNDS", 1)
    monkeypatch.setattr(cost, "BATCH_SIZE", 4)
    costs = cost.run(lambda text: None)
    free, frozen, efficient = (costs[way] for way in cost.WAYS)
    assert efficient.kept < 0.8 * frozen.kept
    assert frozen.kept == pytest.approx(free.kept, rel=0.01)
    assert all(len(one.seconds) == 1 for one in costs.values())
    assert_table_of_the_page(cost.table([costs, costs]))


def test_tables_are_those_of_the_page_of_results(tuning, recalibrating, example, outcomes, free):
    full = {row: outcomes.get(row, free) for row in tuning.ROWS}
    accuracies = dict.fromkeys(tuning.TASKS, 12.5)
    old = recalibrating.old_network(recalibrating.CROPS)
    recalibrated = [recalibrating.Recalibrated(old.given, accuracies, old.said)] * len(recalibrating.ROWS)
    assert_table_of_the_page(tuning.table([full, full]))
    assert_table_of_the_page(recalibrating.table([recalibrated, recalibrated]))
    assert_table_of_the_page(example("drifting").table([full, full]))


def assert_table_of_the_page(table):
    """The page of results shows it, with other numbers; nothing of it is cut in 80 columns."""
    text = printed(table)
    assert "…" not in text
    shown = [line for line in lines(text) if "#" not in line or any(letter.isalpha() for letter in line)]
    assert set(shown) <= set(lines(RESULTS))


def test_the_figure_names_all_layers(example, free, tmp_path):
    figure = example("figure")
    path = figure.save(tmp_path / "figure.png", free)
    assert path.stat().st_size > 10_000
    names = [figure.short(name) for name in free.history.names]
    assert (names[0], names[4], names[-1]) == ("stem bn0", "block 1 bn1", "head bn1")
    assert len(set(names)) == 49


def test_print_config_gives_a_config_that_means_the_same(example, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    texts = []
    for path in (EXAMPLE / "config.yaml", tmp_path / "printed.yaml"):
        with pytest.raises(SystemExit) as stopped:
            example("cli").main(["fit", f"--config={path}", "--print_config"])
        assert not stopped.value.code
        texts.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(texts[-1])
    assert texts[0] == texts[1]
    classes = [callback["class_path"] for callback in yaml.safe_load(texts[0])["trainer"]["callbacks"]]
    assert classes == ["lightning_bn.BatchNormFreezer", "lightning_bn.BatchNormMonitor"]


def test_config_as_it_stands_freezes_and_monitors(example, tmp_path):
    arguments = {
        "trainer.limit_train_batches": 2,
        "trainer.limit_val_batches": 1,
        "trainer.logger.init_args.save_dir": tmp_path,
        "trainer.enable_progress_bar": False,
    }
    command = [f"--{name}={value}" for name, value in arguments.items()]
    trainer = example("cli").main(["fit", f"--config={EXAMPLE / 'config.yaml'}", *command]).trainer
    freezer = next(one for one in trainer.callbacks if type(one).__name__ == "BatchNormFreezer")
    assert freezer.report.identical
    assert len(freezer.report.layers) == 49
    assert trainer.callback_metrics["bn/jeffreys_max"] == 0
