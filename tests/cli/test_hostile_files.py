"""Files that are broken or made to harm: one clear line, nothing executed, no more memory than is stated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_bn._cli.main import main
from tests.cli.hostile import calls, folders, headers, pickles, places, states
from tests.cli.hostile.writing import FILES, MARK, layer, saved

ROOT = Path(__file__).parent.parent.parent


def test_there_are_many_of_them():
    for module in (calls, folders, headers, pickles, places, states):  # each lists its own
        assert any(write.__module__ == module.__name__ for write, _ in FILES.values())
    assert len(FILES) >= 80


@pytest.mark.parametrize("name", FILES)
def test_a_file_made_to_harm_does_none(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, code = FILES[name]
    path = str(write(tmp_path))
    for arguments in (["inspect", path], ["diff", path, path], ["tasks", path]):
        given = main(arguments)
        said = capsys.readouterr()
        assert given == (2 if arguments[0] == "tasks" else code) or arguments[0] == "diff", said
        assert "Traceback" not in said.out + said.err
        assert "\x1b" not in said.out + said.err
        assert not (tmp_path / MARK).exists()
        if given == 2:
            assert said.out == ""
            [line] = said.err.splitlines()
            assert line.startswith(f"lightning-bn {arguments[0]}: ")
            assert 30 < len(line) < 900


WHY = {
    "empty": "is empty (0 bytes)",
    "page_of_a_failed_download": "does not begin like a file of torch.save or of safetensors",
    "pipe_that_nobody_writes_to": "is not a regular file",
    "device_without_end": "is not a regular file",
    "empty_folder": "holds no checkpoint",
    "folder_of_several": "holds 2 checkpoints ('a.ckpt', 'b.ckpt'): name one of them",
    "folder_in_many_parts": "dcp_to_torch",
    "index_that_leads_outside": "names a file outside of its folder",
    "index_without_its_shards": "'model-1.safetensors', which is not in its folder",
    "index_that_lies": "says that 'bn.running_mean' is in model-1.safetensors, but it is not",
    "index_larger_than_any": "is not an index of shards",
    "zip_cut_in_the_middle": "it is incomplete",
    "zip_bomb": "with compressed entries",
    "zip_that_is_compressed": "with compressed entries",
    "zip_that_claims_other_sizes": "with compressed entries",
    "zip_with_a_pickle_beyond_bounds": "bytes beside its tensors",
    "old_pickle_that_runs_a_command": "to read those would execute code",
    "zip_that_runs_a_command": "to read those would execute code",
    "zip_that_evaluates": "to read those would execute code",
    "zip_with_an_object": "argparse.Namespace",
    "bytes_by_their_number": "is made to fill the memory: it calls 'bytearray' with a number",
    "tensors_that_are_not_in_the_file": "it claims tensors of 1,000,000,000",
    "pairs_that_are_a_tensor_without_end": "it calls 'OrderedDict' with a tensor",
    "tensor_without_end_in_another_type": "with a tensor that has more values than there are",
    "set_of_a_tensor_without_end": "it calls 'set' with a tensor",
    "key_of_tuples_in_tuples": "a key is a tuple of tuples without end",
    "no_batch_norm": "no name in it ends with running_mean",
    "nested_deep": "only deeper than the 8 keys one inside the other that are searched: under",
    "two_dimensions": "BatchNorm has one value per channel",
    "billion_channels_of_four_bytes": "says that it holds 8,000,000,0",
    "many_names_for_more_than_any_network_has": "At most 67,108,864 are read",
    "header_of_an_exabyte": "say that the header has 1,152,921,504,606,846,976 bytes",
    "header_longer_than_the_file": "say that the header has 500 bytes",
    "header_larger_than_any": "at most 16,777,216 are read",
    "overlapping_tensors": "cannot be read as a file of safetensors",
}


@pytest.mark.parametrize("name", WHY)
def test_the_line_says_what_is_the_matter(name, tmp_path, capsys):
    assert main(["inspect", str(FILES[name][0](tmp_path))]) == 2
    assert WHY[name] in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["zip_that_runs_a_command", "header_of_an_exabyte", "mean_without_variance", "missing"]
)
def test_a_program_gets_json_whatever_the_file_is(name, tmp_path, capsys):
    write, code = FILES[name]
    assert main(["inspect", str(write(tmp_path)), "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert ("error" in found) == (code == 2)
    assert found["format"] == 1


def test_a_payload_of_the_tests_would_be_executed_by_pickle(tmp_path):
    import pickle

    write, _ = FILES["old_pickle_that_runs_a_command"]
    pickle.loads(write(tmp_path).read_bytes())
    assert (tmp_path / MARK).exists()


UNPRIVILEGED = """
import os, sys
import lightning_bn._callback_states, lightning_bn._cli.inspect_file
from lightning_bn._cli.main import main
if os.geteuid() == 0:
    os.setuid(65534)  # root may read everything
sys.exit(main(sys.argv[1:]))
"""


def test_a_file_that_may_not_be_read_is_said_to_be_one(tmp_path):
    path = saved(tmp_path, layer())
    path.chmod(0)
    command = [sys.executable, "-c", UNPRIVILEGED, "inspect", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"lightning-bn inspect: {path}: permission denied.\n"


MEASURE = """
import contextlib, io, resource, sys, tempfile
from pathlib import Path
from lightning_bn._cli.main import main
from tests.cli.hostile import calls, folders, headers, pickles, places, states
from tests.cli.hostile.writing import FILES
import lightning_bn.functional, rich.console, zipfile
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for name in sys.argv[1:]:
    with tempfile.TemporaryDirectory() as folder:
        path = FILES[name][0](Path(folder))
        before = peak()
        with contextlib.redirect_stdout(io.StringIO()):
            main(["inspect", str(path)])
        print(name, peak() - before, flush=True)
"""
BIG = ["billion_channels_of_four_bytes", "many_names_for_more_than_any_network_has", "zip_that_wants_a_terabyte"]
BIG += ["header_of_an_exabyte", "header_larger_than_any", "index_larger_than_any", "shape_that_does_not_fit"]
BIG += ["zip_that_claims_other_sizes", "zip_with_a_pickle_beyond_bounds", "nested_wide", "cyclic_dictionary"]
BIG += ["zip_with_lists_in_lists", "zip_bomb", "bytes_by_their_number", "bytes_by_their_number_before_1_6"]
BIG += ["bytes_by_their_number_as_a_tensor", "bytes_doubled_again_and_again", "bytes_of_the_same_text"]
BIG += ["set_of_a_tensor_without_end", "tensor_without_end_in_another_type"]
BIG += ["pairs_that_are_a_tensor_without_end", "tensors_that_are_not_in_the_file"]
BIG += ["task_that_is_lists_in_lists", "report_of_lists_in_lists"]


def test_what_claims_much_takes_little():
    done = subprocess.run([sys.executable, "-c", MEASURE, *BIG], cwd=ROOT, capture_output=True, text=True, check=True)
    taken = {name: int(megabytes) for name, megabytes in map(str.split, done.stdout.splitlines())}
    assert list(taken) == BIG
    assert max(taken.values()) < 150, taken
