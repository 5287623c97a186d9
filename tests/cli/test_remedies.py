"""What to do about a file: each remedy once, at the end, as a command for this very file."""

import json
import re
import shlex

import pytest
import torch

from lightning_bn.functional import recalibrate_checkpoint
from tests.cli.planting import fill
from tests.cli.test_inspect import shards
from tests.models import SmallResNet, images

NAN = float("nan")


def commands(said):
    """Those that the output shows, as a shell reads them."""
    said = said.replace("\\\n", " ")
    return [shlex.split(line) for line in said.splitlines() if line.startswith("  lightning-bn ")]


def option(words, name):
    return words[words.index(name) + 1] if name in words else None


def test_a_remedy_is_told_once_with_the_name_of_the_file(state, save, command):
    fill(state, "bn1", mean={2: NAN})
    fill(state, "head.bn", var={1: -1.0})
    fill(state, "layer1.0.bn1", 0.0, 0.0)
    _, said = command("inspect", save(state, "my file.pt"))
    [words] = commands(said)
    assert option(words, "--ckpt_path").endswith("/my file.pt")
    assert option(words, "--out") == "my file-precise.pt"
    assert "--key" not in words
    assert said.count("--ckpt_path") == 1
    assert re.search(r"^- negative variance, zeros: recalibrate\.$", said, re.M)


def test_a_healthy_file_ends_with_the_question_to_the_data(trained, save, command):
    _, said = command("inspect", save(trained))
    *_, question, command_shown = said.strip().split("\n\n")
    assert question.startswith("Only data can show whether the statistics fit the weights.")
    assert commands(command_shown)[0][:2] == ["lightning-bn", "recalibrate"]


def test_lost_weights_are_not_recalibrated(state, save, command):
    fill(state, "bn1", weight={0: NAN})
    _, said = command("inspect", save(state))
    assert commands(said) == []
    assert "go back to an earlier checkpoint" in " ".join(said.split())


def test_collapsed_layers_are_recalibrated_before_the_network_is_blamed(state, save, command):
    fill(state, "bn1", var=1e-9)
    assert commands(command("inspect", save(state))[1])


def test_a_layer_without_its_variance_is_told_what_helps(trained, save, command, found, tmp_path):
    path = save({name: value for name, value in trained.items() if name != "bn1.running_var"})
    _, said = command("inspect", path)
    assert "running statistics that a file lacks are added" in " ".join(said.split())
    [words] = commands(said)
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / option(words, "--out"))
    assert found("inspect", tmp_path / option(words, "--out"))[0] == 0


def test_a_layer_of_another_size_is_not_recalibrated(trained, save, command):
    code, said = command("inspect", save({**trained, "bn1.running_var": torch.ones(2)}))
    assert code == 1
    assert "lacks are added" not in said
    assert "broken: go back to the file that this one was made from." in " ".join(said.split())


@pytest.mark.parametrize(("times", "told"), [(1e6, True), (2e4, True), (1e3, False)])
def test_a_whole_layer_of_another_order_is_worth_knowing(times, told, trained, save, found):
    variances = torch.cat([value for name, value in trained.items() if name.endswith("running_var")])
    variance = torch.full((4,), float(variances.median() * times))
    code, said = found("inspect", save({**trained, "layer1.0.bn1.running_var": variance}))
    assert code == 0
    notes = [one for one in said["findings"] if one["kind"] == "out of scale"]
    assert [one["layers"] for one in notes] == ([["layer1.0.bn1"]] if told else [])
    assert all(one["command"] for one in notes)


def averages(state):
    average = {name: value.clone() for name, value in state.items()}
    average["bn1.weight"] += 0.5
    return average


def planted(state):
    """The same with a fault."""
    state = {name: value.clone() for name, value in state.items()}
    fill(state, "bn1", mean={0: NAN})
    return state


#: What a file holds, with a fault in one entry, and the --key that its command needs.
KEYED = {
    "average beside the model": (lambda one: {"state_dict": one, "ema_state_dict": planted(one)}, "ema_state_dict"),
    "model beside an average": (lambda one: {"state_dict": planted(one), "ema_state_dict": one}, "state_dict"),
    "nested": (lambda one: {"run": {"model": one, "ema": planted(one)}}, "run.ema"),
    "nested alone": (lambda one: {"run": {"model": planted(one)}}, None),
    "of Lightning": (lambda one: {"state_dict": planted(one), "ema": one, "pytorch-lightning_version": "2.5"}, None),
    "average of Lightning": (
        lambda one: {"state_dict": one, "ema": planted(one), "pytorch-lightning_version": "2.5"},
        "ema",
    ),
}


@pytest.mark.parametrize("form", KEYED)
def test_the_command_has_the_key_that_it_needs_and_mends_the_fault(form, trained, tmp_path, save, command, found):
    make, key = KEYED[form]
    path = save(make(trained))
    _, said = found("inspect", path)
    [words] = {one["command"] for one in said["findings"] if one["is_fault"]}
    words = shlex.split(words)
    assert option(words, "--key") == key
    out = tmp_path / option(words, "--out")
    recalibrate_checkpoint(option(words, "--ckpt_path"), SmallResNet(), [images(8)], out, key=option(words, "--key"))
    assert found("inspect", out)[0] == 0
    if key is None:
        recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "n.pt")
    elif "Lightning" not in form:
        with pytest.raises(ValueError, match="choose key="):
            recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "n.pt")


def test_where_no_command_helps_what_does_is_said(trained, save, command, tmp_path):
    inside = {**trained, **{f"ema_model.{name}": value for name, value in planted(trained).items()}}
    code, said = command("inspect", save(inside))
    assert code == 1
    assert commands(said) == []
    assert "prefix='ema_model.'" in said
    recalibrate_checkpoint(tmp_path / "file.ckpt", SmallResNet(), [images(8)], tmp_path / "out.pt", prefix="ema_model.")
    assert command("inspect", "out.pt")[0] == 0
    code, said = command("inspect", save([planted(trained)]))
    assert code == 1
    assert commands(said) == []
    assert "Save the state dict in a file of its own first." in " ".join(said.split())


@pytest.mark.parametrize("averaged_statistics", [False, True])
def test_the_note_on_averages_stays_when_the_other_entry_was_recalibrated(
    averaged_statistics, trained, tmp_path, save, found
):
    average = averages(trained)
    if averaged_statistics:
        fill(average, "bn1", var={0: 0.25})
    path = save({"state_dict": trained, "ema": average})
    out = tmp_path / "out.pt"
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], out, key="state_dict")
    for file in (path, out):
        [note] = found("inspect", file)[1]["findings"]
        assert (note["kind"], note["entry"]) == ("averages", "ema")
        assert "--key ema " in note["command"]
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], out, key="ema", overwrite=True)
    assert found("inspect", out)[1]["findings"] == []


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_averages_without_statistics_are_told_and_get_them(wrapped, trained, save, found, tmp_path):
    average = {f"{wrapped}{name}": value for name, value in trained.items() if name.endswith(("weight", "bias"))}
    path = save({"state_dict": trained, "ema_state_dict": average, "pytorch-lightning_version": "2.5"})
    code, said = found("inspect", path)
    [note] = said["findings"]
    assert (code, note["kind"], note["entry"], len(note["layers"])) == (0, "averages", "ema_state_dict", 10)
    words = shlex.split(note["command"])
    assert option(words, "--key") == "ema_state_dict"
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "out.ckpt", key="ema_state_dict")
    entries = found("inspect", tmp_path / "out.ckpt")[1]["entries"]
    assert [one["key"] for one in entries] == ["state_dict", "ema_state_dict"]
    head = {name: value for name, value in average.items() if "head" in name}
    assert found("inspect", save({"state_dict": trained, "ema_head": head}))[1]["findings"] == []


def test_averaged_counters_say_nothing_of_initial_values(trained, save, found, command):
    average = averages(trained)
    for name in average:
        if name.endswith("tracked"):
            average[name].fill_(3)
    path = save({"state_dict": average, "current_model_state": trained, "averaging_state": {}})
    _, said = found("inspect", path)
    assert {one["initial_left"] for one in said["entries"][0]["layers"]} == {None}
    assert None not in {one["initial_left"] for one in said["entries"][1]["layers"]}
    assert [one["kind"] for one in said["findings"]] == ["averages"]
    assert "initial values left" not in " ".join(command("inspect", path)[1].split())


def with_few_updates(state):
    for name in state:
        if name.endswith("tracked"):
            state[name].fill_(5)
    state["bn1.num_batches_tracked"].fill_(7)
    return state


@pytest.mark.parametrize("form", ["a checkpoint", "safetensors"])
def test_recalibrated_layers_are_told_as_such_and_not_as_warming_up(form, state, tmp_path, save, found, command):
    state = with_few_updates(state)
    path = save({"state_dict": state} if form == "a checkpoint" else state, "in.pt")
    out = tmp_path / ("out.pt" if form == "a checkpoint" else "out.safetensors")
    assert [one["kind"] for one in found("inspect", path)[1]["findings"]] == ["warming up", "counters"]
    recalibrate_checkpoint(path, SmallResNet(), [images(8), images(4, seed=1)], out)
    _, said = found("inspect", out)
    assert said["findings"] == []
    assert {tuple(counts) for counts in said["entries"][0]["recalibrated"].values()} == {(2, 12)}
    assert "Recalibrated: all layers from 2 batches with 12 samples." in command("inspect", out)[1]


def test_a_comparison_knows_a_recalibration(state, tmp_path, save, command):
    path = save({"state_dict": state}, "in.pt")
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "all.pt")
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "one.pt", modules="head")
    said = " ".join(command("diff", path, "all.pt")[1].split())
    assert "In the second file all layers were recalibrated, as it records." in said
    assert said.endswith("the drift is how far off the statistics of the first file were")
    said = " ".join(command("diff", path, "one.pt")[1].split())
    assert "In the second file 1 layer was recalibrated, as it records." in said
    for name in (said, " ".join(command("diff", path, "all.pt")[1].split())):
        assert "another run" not in name
    assert "another run" in command("diff", "all.pt", path)[1].replace("\n", " ")


def test_layers_that_were_left_out_are_warming_up_still(state, tmp_path, save, found, command):
    path = save({"state_dict": with_few_updates(state)}, "in.pt")
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "out.pt", exclude="head")
    _, said = found("inspect", tmp_path / "out.pt")
    assert [(one["kind"], one["layers"]) for one in said["findings"]] == [("warming up", ["head.bn"])]
    assert "Recalibrated: 9 layers from 1 batch with 8 samples." in command("inspect", tmp_path / "out.pt")[1]


def test_a_record_does_not_count_where_the_statistics_changed_afterwards(state, tmp_path, save, found):
    path = save({"state_dict": with_few_updates(state)}, "in.pt")
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "out.pt")
    content = torch.load(tmp_path / "out.pt")
    content["state_dict"]["bn1.running_mean"][0] += 1e-3
    _, said = found("inspect", save(content))
    assert [(one["kind"], one["layers"]) for one in said["findings"]] == [("warming up", ["bn1"])]


def test_statistics_of_which_the_old_ones_are_a_part_are_not_recorded(state, tmp_path, save, found):
    path = save({"state_dict": with_few_updates(state)}, "in.pt")
    recalibrate_checkpoint(path, SmallResNet(), [images(8)], tmp_path / "out.pt", prior=8.0)
    assert [one["kind"] for one in found("inspect", tmp_path / "out.pt")[1]["findings"]] == ["warming up", "counters"]


def test_a_recalibration_of_a_callback_is_of_the_models_own_statistics_only(state, save, found):
    state = with_few_updates(state)
    callbacks = {"PreciseBatchNorm": {"done_at_step": 9}}
    content = {"state_dict": state, "student": {**state}, "global_step": 9, "callbacks": callbacks}
    _, said = found("inspect", save(content))
    assert {one["entry"] for one in said["findings"]} == {"student"}


def test_a_recalibration_of_a_callback_is_not_of_the_layers_that_a_freezer_kept(state, save, found, command):
    layers = [name.removesuffix(".running_mean") for name in state if name.endswith("running_mean")]
    callbacks = {
        "PreciseBatchNorm": {"done_at_step": 9},
        "BatchNormFreezer": {"settings": {"stats": True}, "report": {"layers": layers[:2]}},
    }
    path = save({"state_dict": state, "global_step": 9, "callbacks": callbacks})
    [entry] = found("inspect", path)[1]["entries"]
    assert sorted(entry["recalibrated"]) == sorted(layers[2:])
    assert f"Recalibrated: {len(layers) - 2} layers." in command("inspect", path)[1]


@pytest.mark.parametrize("named", ["", "model.safetensors.index.json"])
def test_the_command_for_shards_mends_the_fault(named, trained, tmp_path, command, found):
    folder = tmp_path / "saved"
    folder.mkdir()
    shards(folder, planted(trained))
    code, said = command("inspect", folder / named)
    [words] = commands(said)
    assert code == 1
    out = tmp_path / option(words, "--out")
    recalibrate_checkpoint(option(words, "--ckpt_path"), SmallResNet(), [images(8)], out)
    assert found("inspect", out)[0] == 0


def test_lost_counters_are_told_with_the_layers_that_have_them(state, save, found):
    state["bn1.num_batches_tracked"].fill_(0)
    _, said = found("inspect", save(state))
    assert [(one["kind"], one["layers"]) for one in said["findings"]] == [("counters lost", ["bn1"])]
    assert "momentum" in said["findings"][0]["remedy"]


def test_missing_counters_are_explained(state, save, command):
    state = {name: value for name, value in state.items() if not name.endswith("tracked")}
    assert "Updates: these layers have no counter in the file." in command("inspect", save(state))[1]


def test_a_name_that_a_console_must_not_see_is_not_printed(trained, tmp_path, command):
    path = tmp_path / "evil\x1b[31m.pt"
    torch.save(trained, path)
    _, said = command("inspect", path)
    assert "\x1b" not in said
    assert option(commands(said)[0], "--ckpt_path") == "FILE"


def test_the_page_has_the_remedies_and_the_command(state, save, command, tmp_path):
    fill(state, "bn1", mean={2: NAN})
    command("inspect", save(state, "a.pt"), "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<pre>lightning-bn recalibrate --config train.yaml") == 1
    assert json.dumps(page).count("What to do") == 1
