"""A safetensors file of a gigabyte: only what belongs to BatchNorm is read."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LAYERS, CHANNELS = 500, 256
MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]], check=False)
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def large_file(path: Path) -> Path:
    """A gigabyte of convolutions between 500 BatchNorm layers, of which the disk holds what belongs to BatchNorm."""
    header: dict[str, object] = {}
    places: dict[str, int] = {}
    end = 0

    def add(name: str, dtype: str, shape: list[int], size: int) -> None:
        nonlocal end
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        places[name], end = end, end + size

    for number in range(LAYERS):
        add(f"blocks.{number}.conv.weight", "F32", [512, 1024], 4 * 512 * 1024)
        for part in ("weight", "bias", "running_mean", "running_var"):
            add(f"blocks.{number}.bn.{part}", "F32", [CHANNELS], 4 * CHANNELS)
        add(f"blocks.{number}.bn.num_batches_tracked", "I64", [], 8)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for name, place in places.items():
            file.seek(8 + len(text) + place)
            if name.endswith(("running_var", "bn.weight")):
                file.write(struct.pack(f"<{CHANNELS}f", *([2.0] * CHANNELS)))
            elif name.endswith("tracked"):
                file.write(struct.pack("<q", 1000))
    return path


def peak_of(*arguments: str) -> tuple[int, str]:
    """Megabytes that the command needed at most, and what it printed."""
    command = [sys.executable, "-c", MEASURE, "-m", "lightning_bn", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said, _, peak = done.stdout.rpartition("peak ")
    return int(peak), " ".join(said.split())


@pytest.mark.slow
def test_a_gigabyte_is_inspected_and_compared_in_300_megabytes(tmp_path):
    path = large_file(tmp_path / "large.safetensors")
    assert path.stat().st_size > 1e9
    before, _ = peak_of("--version")
    for arguments in (["inspect", str(path)], ["diff", str(path), str(path)]):
        peak, said = peak_of(*arguments)
        assert "500 BatchNorm layers" in said
        assert before < peak < 300
