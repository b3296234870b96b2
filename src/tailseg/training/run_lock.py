"""The folder of a run: one training at a time writes into it, and what a killed one left half written is removed."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lightning_fabric import Fabric

from tailseg.errors import UserError
from tailseg.files import writing

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

NAME = ".lock"
# As `checkpoint.write_tensors`, `errors.write_whole`, `RunLog` and an evaluation name what is not complete yet.
UNFINISHED = (
    *(".*.part", "features/.*.part", "features/*/.*.part"),
    *(".detections.*.json", ".detections.*.json.partial", "detections.json.partial"),
)

_held: set[int] = set()  # file descriptors


def _let_go() -> None:
    """Close the locks in a forked child: a loader worker that outlives its training must not keep the folder."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Keep other trainings out of a folder, which is made if absent (and removed if nothing came of it).

    The kernel releases the lock when the process ends, however it ends. Where the file system knows no locks, a
    warning says so.

    Raises:
        UserError: another process trains there.
    """
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    path = out / NAME
    descriptor = _locked(path, out)
    if descriptor is None:
        yield
        return
    _held.add(descriptor)
    try:
        with writing(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):  # the disk may be gone by now
            path.unlink()  # before it is released: whoever comes then sees that its file is another
            if is_new:
                out.rmdir()
        _held.discard(descriptor)
        os.close(descriptor)


def _locked(path: Path, out: Path) -> int | None:
    """A descriptor that holds the lock; None where there are no locks."""
    if sys.platform == "win32":
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            who = f"process {holder}" if holder else "another process"
            raise UserError(
                f"{out}: {who} is training in this folder; wait for it, end it, or choose another --out"
            ) from None
        except OSError as error:
            os.close(descriptor)
            logger.warning("%s: cannot be locked (%s); see to it that no other training writes here.", out, error)
            return None
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)  # its owner removed the file between our two calls


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def remove_unfinished(out: Path) -> None:
    """Remove what a killed training was writing; nobody else may be writing there (see `run_lock`)."""
    found = [path for pattern in UNFINISHED for path in out.glob(pattern)]
    for path in found:
        path.unlink(missing_ok=True)
    if found:
        logger.info("%s: removed %d unfinished files of a run that was killed, such as %s.", out, len(found), found[0])


def lock_for_all(fabric: Fabric, out: Path, stack: ExitStack) -> None:
    """Take and tidy the folder: process 0 for all of them, so that all end where it is not free."""
    trouble = None
    if fabric.global_rank == 0:
        try:
            stack.enter_context(run_lock(out))
            remove_unfinished(out)
        except (UserError, OSError) as error:
            trouble = error
    elsewhere = fabric.broadcast(str(trouble) if trouble is not None else None)
    if trouble is not None:
        raise trouble
    if elsewhere is not None:
        raise UserError(elsewhere)
