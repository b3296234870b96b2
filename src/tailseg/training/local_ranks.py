"""The ranks of a run on one machine: started by rank 0, and none outlives another before they know each other.

Afterwards `tailseg.training.links` watches them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_fabric.plugins.environments import ClusterEnvironment

PARENT = "TAILSEG_RANK_0"  # its process, in the environment of those that it started
PATIENCE = 0.3  # seconds between two looks
KILLED_FOR_MEMORY = "as the system does when memory runs out"

_started: dict[int, subprocess.Popen[bytes]] = {}  # rank -> process; of rank 0 alone
_linked = threading.Event()


def start_ranks(environment: ClusterEnvironment, devices: int) -> None:
    """Start all ranks but this one, unless torchrun or SLURM did; in a started one, look after rank 0.

    Each runs the command that this process was started with.
    """
    if PARENT in os.environ:
        threading.Thread(target=_watch_parent, args=(int(os.environ[PARENT]), devices), daemon=True).start()
    elif not environment.creates_processes_externally:
        os.environ |= {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "WORLD_SIZE": str(devices),
            "NODE_RANK": "0",
            "LOCAL_RANK": "0",
        }
        for rank in range(1, devices):
            surroundings = {**os.environ, "LOCAL_RANK": str(rank), PARENT: str(os.getpid())}
            _started[rank] = subprocess.Popen(_own_command(), env=surroundings)
        threading.Thread(target=_watch_started, args=(devices,), daemon=True).start()


def _own_command() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    script = [str(Path(sys.argv[0]).absolute())] if spec is None else ["-m", spec.name]
    if spec is not None and spec.name == "__main__":  # the launcher that pip makes on Windows is a ZIP file
        script = ["-m", "tailseg"]
    return [sys.executable, *script, *sys.argv[1:]]


@contextmanager
def starting() -> Iterator[None]:
    """Leave it to the watching thread to tell why the ranks do not find each other, if one of them is gone."""
    try:
        yield
    except Exception:
        if _started or PARENT in os.environ:
            time.sleep(5 * PATIENCE)
        raise


def linked() -> None:
    """From now on the ranks know each other, and nobody is watched here."""
    _linked.set()


def how_it_died(rank: int) -> str:
    """What befell a rank that ended without a word, as the rest of a sentence about it."""
    process = _started.get(rank)
    code = None
    if process is not None:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=2)
    if code is None or code == -9:  # SIGKILL, which Windows has no name for
        return f"was killed{' by SIGKILL' if code else ''}, {KILLED_FOR_MEMORY}"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _watch_started(devices: int) -> None:
    while not _linked.wait(PATIENCE):
        for rank, process in _started.items():
            code = process.poll()
            if code:
                if code < 0:  # else it has said why
                    _say(f"rank {rank} of {devices} {how_it_died(rank)}, before the run began; start it again")
                for other in _started.values():
                    other.kill()
                os._exit(code if code > 0 else 1)


def _watch_parent(parent: int, devices: int) -> None:
    while os.getppid() == parent:
        if _linked.wait(PATIENCE):
            return
    if os.environ["LOCAL_RANK"] == "1":  # one of them
        _say(f"rank 0 of {devices} was killed, {KILLED_FOR_MEMORY}, before the run began; start it again")
    os._exit(1)


def _say(sentence: str) -> None:
    print(f"tailseg: {sentence}", file=sys.stderr, flush=True)
