"""A rank of a two-process run that dies ends the run everywhere, in one sentence, with the last complete step saved."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_tools import SOAK, TINY, about
from tiny import ENVIRONMENT, options

from tailseg.data.synthetic.generate import SyntheticSettings, write_synthetic

LIMIT = 30  # seconds from the death of a rank to the end of the last process

# The real command, in which one rank meets its end at a point of the run.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path

rank, place, how = int(os.environ["DIES"]), os.environ["PLACE"], os.environ["HOW"]
me = int(os.environ.get("LOCAL_RANK", 0))


def die():
    Path(os.environ["NOTE"]).write_text(str(time.time()))
    if how == "raise":
        raise ArithmeticError("planted")
    if how == "user":
        from tailseg.errors import UserError
        raise UserError("a.jpg: is broken; get it again")
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, how))


if place == "start" and me == rank:
    die()
import torch, torch.distributed
from tailseg.cli.main import main
from tailseg.losses.seesaw import SeesawLoss
from tailseg.training import evaluations, loop
from tailseg.training.loop import Run

if me == rank:
    homes = {
        "meet": (torch.distributed, "init_process_group"), "build": (loop, "build_detector"), "begin": (Run, "start"),
        "count": (SeesawLoss, "_add"), "backward": (torch.Tensor, "backward"), "update": (torch.optim.AdamW, "step"),
        "step": (Run, "train_step"), "save": (Run, "save"), "evaluate": (evaluations, "evaluate"),
        "agree": (Run, "agreed"),
    }
    if place == "diverge":  # on this rank alone
        found = loop.losses_of

        def diverged(model, batch, size):
            losses = found(model, batch, size)
            return {**losses, "box": losses["box"] * (float("nan") if Path(os.environ["OUT"]).exists() else 1)}

        loop.losses_of = diverged
    if place in homes:
        home, name = homes[place]
        plain, calls = getattr(home, name), [int(os.environ["CALLS"])]

        def watched(*args, **options):
            calls[0] -= 1
            if calls[0] == 0:
                die()
            return plain(*args, **options)

        setattr(home, name, watched)
elif os.environ.get("BUSY"):  # the other one is not in a collective, and will not be
    plain_step = Run.train_step

    def busy(self, batches):
        if self.step == 2:
            time.sleep(120)
        return plain_step(self, batches)

    Run.train_step = busy
main()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "data"
    write_synthetic(folder, SyntheticSettings(classes=4, train_images=12, val_images=4, size=64, rarest=3))
    return folder


def train(out: Path, data: Path, *more: str, **environment: object) -> tuple[int, str, float]:
    """Exit code, stderr, and the seconds from a rank's death to the end of the last process."""
    script, note = out.with_suffix(".py"), out.with_suffix(".time")
    script.write_text(SCRIPT)
    line = [sys.executable, script, "train", "demo/seesaw", "--data", data, "--out", out, "--devices", 2, "--quiet"]
    process = subprocess.Popen(
        [*map(str, line), *options((*TINY, "schedule.warmup_steps=1", "schedule.milestones=[]")), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **ENVIRONMENT,
            "NOTE": str(note),
            "OUT": str(out / "trainer.safetensors"),
            **{key: str(value) for key, value in environment.items()},
        },
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=200)  # to the end of the last one that holds the pipe
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    ended = time.time()
    return process.returncode, errors, ended - float(note.read_text()) if note.exists() else 0.0


def died(out: Path, data: Path, rank: int, place: str, how: str = "SIGKILL", calls: int = 1, **more: object) -> str:
    """The one line that the whole command writes to stderr."""
    code, errors, seconds = train(out, data, DIES=rank, PLACE=place, HOW=how, CALLS=calls, **more)
    assert errors.startswith("tailseg: ")
    assert errors.count("\n") == 1, errors
    assert code == (-signal.SIGKILL if rank == 0 and how == "SIGKILL" else 1)
    assert 0 < seconds < LIMIT
    return errors.strip().removeprefix("tailseg: ")


def step_of(out: Path) -> int:
    return int(about(out / "trainer.safetensors")["step"])


def test_a_killed_rank_ends_the_run_in_a_sentence(data: Path, tmp_path: Path) -> None:
    """In the third step: the second, which was not due to be saved, is saved by the rank that lives."""
    out = tmp_path / "run"
    said = died(out, data, 1, "backward", calls=4)
    assert said == "rank 1 of 2 was killed by SIGKILL, as the system does when memory runs out; go on with --resume"
    assert step_of(out) == 3


@pytest.mark.skipif(not SOAK, reason="in `make soak` only")
class TestEveryPoint:
    BEFORE = ", before the run began; start it again"
    KILLED = r"rank {} of 2 was killed( by SIGKILL)?, as the system does when memory runs out"

    @pytest.mark.parametrize(
        ("rank", "place", "calls", "saved"),
        [
            (1, "start", 1, None),
            (0, "meet", 1, None),
            (1, "meet", 1, None),
            (0, "build", 1, None),
            (1, "begin", 1, None),
            (0, "count", 2, None),
            (1, "count", 4, 3),
            (0, "backward", 4, 3),
            (0, "update", 3, 2),
            (1, "step", 3, 2),
            (1, "save", 1, 2),
            (0, "evaluate", 1, 3),
            (1, "evaluate", 2, 6),
            (1, "agree", 2, 2),
        ],
    )
    def test_killed(self, data: Path, tmp_path: Path, rank: int, place: str, calls: int, saved: int | None) -> None:
        out = tmp_path / "run"
        said = died(out, data, rank, place, calls=calls)
        assert re.match(self.KILLED.format(rank), said), said
        if saved is None:
            assert said.endswith((self.BEFORE, "; start again: nothing was saved yet"))
        else:
            assert said.endswith("; go on with --resume")
            assert step_of(out) == saved
        # As advised.
        again = train(out, data, *([] if saved is None else ["--resume"]), DIES=-1, PLACE="", HOW="", CALLS=0)
        assert again[0] == 0, again[1]
        assert step_of(out) == 6

    @pytest.mark.parametrize("rank", [0, 1])
    def test_raised(self, data: Path, tmp_path: Path, rank: int) -> None:
        out = tmp_path / "run"
        said = died(out, data, rank, "count", "raise", calls=3)
        kept = out / "traceback.txt"
        assert said.startswith(f"rank {rank} of 2 failed (ArithmeticError: planted), traceback in {kept}; go on with")
        assert "ArithmeticError: planted" in kept.read_text()

    @pytest.mark.parametrize("rank", [0, 1])
    def test_told_by_a_rank_itself(self, data: Path, tmp_path: Path, rank: int) -> None:
        assert died(tmp_path / "run", data, rank, "step", "user", calls=2) == "a.jpg: is broken; get it again"

    @pytest.mark.parametrize("rank", [0, 1])
    def test_diverged_in_one_rank_alone(self, data: Path, tmp_path: Path, rank: int) -> None:
        """No rank saves what came of it."""
        out = tmp_path / "run"
        code, errors, _ = train(out, data, "--set", "training.log_steps=3", DIES=rank, PLACE="diverge", HOW="", CALLS=0)
        assert code == 1
        assert re.fullmatch(
            r"tailseg: step 3: the loss 'box' is nan: training diverged; lower optimizer\.lr .*go on with --resume\n",
            errors,
        ), errors
        assert step_of(out) == 2

    def test_another_signal_and_an_exit(self, data: Path, tmp_path: Path) -> None:
        said = died(tmp_path / "one", data, 1, "step", "SIGSEGV", calls=2)
        assert said == "rank 1 of 2 was killed by SIGSEGV; go on with --resume"
        said = died(tmp_path / "two", data, 1, "step", "exit", calls=3)
        assert said == "rank 1 of 2 ended with exit code 3; go on with --resume"

    @pytest.mark.parametrize("rank", [0, 1])
    def test_the_other_one_is_busy_or_waits_for_ever(self, data: Path, tmp_path: Path, rank: int) -> None:
        """As with NCCL, whose collectives do not return when a rank is gone."""
        said = died(tmp_path / "run", data, rank, "step", calls=3, BUSY=1)
        assert re.match(self.KILLED.format(rank) + "; go on with --resume", said), said
