"""What happens to a run from outside, at any of its events, ends it in one sentence or not at all; then it goes on."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_tools import differences, different_tensors, events_of, run, stderr_of, times
from run_faults import FAULTS, set_rights

MODELS = ("last.safetensors", "trainer.safetensors")
soak = pytest.mark.skipif(times(0, 1) == 0, reason="in `make soak` only")


def check_end(out: Path, code: int | None) -> None:
    """One sentence, or what else a run may end with."""
    said = stderr_of(out)
    assert "Traceback" not in said, said
    if code == 1:
        assert said.count("\ntailseg: ") + said.startswith("tailseg: ") == 1, said
        assert said.splitlines()[-1].startswith("tailseg: "), said
    elif code == 130:
        assert said.splitlines()[-1].startswith("Stopped"), said
        assert ("--resume" in said.splitlines()[-1]) == (out / "trainer.safetensors").exists(), said
    else:
        assert code == 0, said


@soak
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "killed"])
def test_at_any_event(data: Path, whole: Path, tmp_path: Path, fault: str) -> None:
    total, count = events_of(whole), times(1, 8)
    rng = random.Random(fault)
    for number in range(count):
        at = rng.randrange(1 + total * number // count, 1 + total * (number + 1) // count)
        out = tmp_path / f"run-{at}"
        code = run(out, data, fault=fault, at=at)
        place = f"{fault} at event {at} of {total}: exit code {code}: {stderr_of(out)}"
        check_end(out, code)
        if fault == "clock set back":
            assert code == 0, place
        set_rights(out, writable=True)
        assert run(out, data) == 0, stderr_of(out)
        if fault == "deleted":  # the log of before is gone
            assert different_tensors(out, whole, MODELS) == [], place
        else:
            assert differences(out, whole) == [], place


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty folder for a small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    yield folder
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


@soak
def test_a_small_disk(data: Path, whole: Path, tmp_path: Path, disk: Path) -> None:
    """A disk that is full at any byte, the last of which the file system itself needs."""
    needed = sum(path.stat().st_size for path in whole.iterdir())
    rng = random.Random(0)
    for number in range(8):
        size = int(needed * (number + rng.random()) / 8) // 4096 * 4096 + 4096
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)]
        if os.name != "posix" or subprocess.run(mount, check=False, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        out = disk / "run"
        code = run(out, data)
        assert code == 1, f"{size} bytes: {stderr_of(out)}"
        check_end(out, code)
        roomy = tmp_path / f"run-{number}"
        shutil.copytree(out, roomy) if out.exists() else None
        subprocess.run(["umount", str(disk)], check=True)
        assert run(roomy, data) == 0, stderr_of(roomy)
        assert differences(roomy, whole) == [], f"{size} bytes"
