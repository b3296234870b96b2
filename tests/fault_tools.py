"""For the tests under faults and attack (`tests/faults`): how many are tried, runs that are killed, damaged files."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from run_faults import happens
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tiny import PRELOADED, SMALL_RECIPE

SOAK = os.environ.get("FAULTS") == "soak"  # `make soak`
TINY = (
    *SMALL_RECIPE,
    "optimizer={name: adamw, lr: 0.001, weight_decay: 0.01, clip: 10}",
    "schedule={epochs: 2, milestones: [1], warmup_steps: 4, warmup_factor: 0.1}",
    "training={evaluate_every: 1, save_steps: 2, log_steps: 1}",
)


def times(few: int, many: int) -> int:
    """How often a fault is tried: ``few`` times in `make test`, ``many`` times in `make soak`."""
    return many if SOAK else few


# ---------------------------------------------------------------------------------------------------------
# Runs in processes of their own


def run(out: Path, data: Path, **options: Any) -> int | None:
    """Train a tiny model to its end, or until a fault ends it; the exit code, minus the signal. Resumes what is there.

    It is the real command, in a process that is forked from one that has imported PyTorch; `stderr_of` has what it
    said. Options are those of `_train`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(out, data, its), kwargs=options)
    process.start()
    its.close()
    process.join(timeout=120)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"{out}: hangs")
    said = b""
    while part := os.read(ours.fileno(), 1 << 16):
        said += part
    out.with_suffix(".stderr").write_bytes(said)
    return process.exitcode


def _train(
    out: Path,
    data: Path,
    stderr: Any,
    *,
    fault: str | None = None,
    at: int | None = None,
    kill_after: float | None = None,
) -> None:
    """Train; one of `run_faults.FAULTS` happens at the ``at``-th event, or a kill after some seconds."""
    torch.set_num_threads(1)
    os.dup2(stderr.fileno(), 2)  # a pipe: on a full disk it still takes what is said
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from tailseg.cli.main import main
    from tailseg.training.loop import Run

    events = happens(fault, out, at)
    step = Run.train_step

    def stepped(self: Run, batches: Iterator[Any]) -> None:
        events()
        step(self, batches)

    Run.train_step = stepped  # type: ignore[method-assign]
    if kill_after is not None:
        threading.Thread(target=_killed_after, args=(kill_after,), daemon=True).start()
    resume = ["--resume"] if (out / "trainer.safetensors").exists() else []
    sys.argv = ["tailseg", "train", "demo/seesaw", "--data", str(data), "--out", str(out), "--quiet", *resume]
    sys.argv += [part for setting in TINY for part in ("--set", setting)]
    try:
        main()
    except SystemExit as ended:
        if not ended.code and fault is None:
            out.with_suffix(".events").write_text(str(events() - 1))
        raise


def stderr_of(out: Path) -> str:
    """What the last process said."""
    return out.with_suffix(".stderr").read_text()


def _killed_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def events_of(out: Path) -> int:
    """The number of events of a run that came to its end."""
    return int(out.with_suffix(".events").read_text())


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the files of two runs, but for the speed in the log."""
    names = [sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) for folder in (one, other)]
    found = [] if names[0] == names[1] else [f"files: {names[0]} and {names[1]}"]
    found += different_tensors(one, other)
    for name in ("detections.json", "metrics.json", "classes.csv", "recipe.yaml"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, other)
    ]
    if [row | {"images_per_second": 0} for row in logs[0]] != [row | {"images_per_second": 0} for row in logs[1]]:
        found.append("metrics.jsonl")
    return found


def different_tensors(
    one: Path, other: Path, names: Sequence[str] = ("last.safetensors", "best.safetensors", "trainer.safetensors")
) -> list[str]:
    """What differs between the models and trainer files of two runs."""
    found = []
    for name in names:
        try:
            a, b = load_file(one / name), load_file(other / name)
        except SafetensorError as error:  # damaged
            found.append(f"{name}: {error}")
            continue
        found += [
            f"{name}: {key}" for key in a.keys() | b.keys() if not (key in a and key in b and a[key].equal(b[key]))
        ]
        if about(one / name) != about(other / name):
            found.append(f"{name}: header")
    return found


def about(path: Path) -> dict[str, Any]:
    """The metadata of a model or trainer file."""
    with safe_open(path, framework="pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


# ---------------------------------------------------------------------------------------------------------
# Damaged files


def damaged(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The content with one fault at a random place, and what that is; never the content itself."""
    faults: list[Callable[[], tuple[str, bytes]]] = [
        lambda: _flipped(content, rng),
        lambda: ("cut off", content[: rng.randrange(len(content))]),
        lambda: _filled(content, rng),
        lambda: _exchanged(content, rng, 8),
        lambda: _exchanged(content, rng, 64),
        lambda: _inserted(content, rng),
    ]
    while True:
        what, found = rng.choice(faults)()
        if found != content:
            return what, found


def _flipped(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
    return f"a bit at {place} flipped", content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


def _filled(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    start = rng.randrange(len(content))
    length = min(rng.choice((1, 16, 512)), len(content) - start)
    return f"{length} zeros at {start}", content[:start] + bytes(length) + content[start + length :]


def _exchanged(content: bytes, rng: random.Random, size: int) -> tuple[str, bytes]:
    blocks = len(content) // size
    if blocks < 2:
        return _flipped(content, rng)
    i, j = sorted(rng.sample(range(blocks), 2))
    a, b = content[i * size : (i + 1) * size], content[j * size : (j + 1) * size]
    changed = content[: i * size] + b + content[(i + 1) * size : j * size] + a + content[(j + 1) * size :]
    return f"blocks {i} and {j} of {size} exchanged", changed


def _inserted(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    place = rng.randrange(len(content) + 1)
    return f"a byte inserted at {place}", content[:place] + bytes([rng.randrange(256)]) + content[place:]
