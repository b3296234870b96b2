"""The ranks of a run watch each other: when one ends before its time, all end, and one of them says why.

Every two ranks hold a connection, over which one that fails says so. The kernel closes it when a process dies,
however that comes about; so nobody has to answer in time, and a rank that is busy is never taken for dead. (A machine
that vanishes from the network closes nothing; TCP's own keep-alive finds that out.) A rank that waits in a collective
for one that is gone, as NCCL does, is ended by its watching thread.
"""

from __future__ import annotations

import atexit
import hmac
import json
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from lightning_fabric import Fabric

from tailseg.data.loading import LoaderKilledError
from tailseg.errors import UserError
from tailseg.training.local_ranks import how_it_died, linked, starting
from tailseg.training.resumption import way_on
from tailseg.wording import one_line

logger = logging.getLogger(__name__)

GRACE = 12.0  # seconds that a rank has to end by itself, once another one has
SETTLE = 3.0  # seconds in which the reason of a broken collective is heard of
CONNECT = 20.0
LONGEST = 8000  # bytes of a message
ALIVE, DONE, FAILED, GONE = "alive", "done", "failed", "gone"
TRACEBACK = "traceback.txt"

_sockets: set[socket.socket] = set()


def _let_go() -> None:
    """Close the connections in a forked child: a loader worker must not keep them open when its rank dies."""
    for connection in _sockets:
        connection.close()
    _sockets.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@dataclass(frozen=True, slots=True)
class Cause:
    """The reason why a run ends before its time."""

    text: str
    joint: str = "; "  # between it and the way on; empty if the text already names that

    def sentence(self, out: Path) -> str:
        """The whole of it, for the user."""
        return f"{self.text}{self.joint}{way_on(out)}" if self.joint else self.text


class Links:
    """Connections of this rank to all others (none if there are none).

    Args:
        fabric: launched.
        out: folder of the run.
    """

    def __init__(self, fabric: Fabric, out: Path) -> None:
        self.rank, self.world, self.out = fabric.global_rank, fabric.world_size, out
        self._state = dict.fromkeys(range(self.world), ALIVE)
        self._cause: Cause | None = None
        self._heard = threading.Event()
        self._asked = False
        self._over = threading.Event()
        self._received: dict[int, bytes] = {}
        self._connections = _connections(self.rank, self.world) if self.world > 1 else {}
        if self._connections:
            linked()
            threading.Thread(target=self._watch, daemon=True, name="tailseg-links").start()

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"rank {self.rank} of {self.world}"

    def cause(self) -> Cause | None:
        """Why another rank has ended; None if none has. The first call waits a little to hear of it."""
        if self.world > 1 and not self._asked:
            self._heard.wait(SETTLE)
            self._asked = True
        return self._cause

    def finish(self) -> None:
        """Tell the others that this rank is done, and they may go on without it."""
        self._send({"state": DONE})
        self._over.set()

    def fail(self, cause: Cause) -> bool:
        """Tell the others why this rank ends; True if it is the one to tell the user."""
        if self.world == 1:
            return True
        self._send({"state": FAILED, "text": cause.text, "joint": cause.joint})
        speaks = self._speaks()
        self._over.set()
        return speaks

    def end_in_time(self, code: int) -> None:
        """Let this process end with ``code`` some seconds after the interpreter, which may wait for others."""
        if self.world > 1:
            _end_in_time(code)

    def _speaks(self) -> bool:
        """The lowest rank that lives speaks; one that has failed has done so, or will."""
        return not any(self._state[rank] in (ALIVE, FAILED) for rank in range(self.rank))

    def _send(self, message: dict[str, str]) -> None:
        line = json.dumps(message).encode() + b"\n"
        for connection in self._connections.values():
            with suppress(OSError):
                connection.sendall(line)

    def _watch(self) -> None:
        deadline = None
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while not self._over.is_set():
                for key, _ in selector.select(timeout=0.2):
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)
                if self._cause is not None and deadline is None:
                    deadline = time.monotonic() + GRACE
                    self._heard.set()
                if deadline is not None and time.monotonic() > deadline:
                    self._end()

    def _read(self, rank: int) -> bool:
        """Take in what a rank says; False if there is no more to come."""
        try:
            piece = self._connections[rank].recv(LONGEST)
        except OSError:
            piece = b""
        held = self._received.get(rank, b"") + piece
        *lines, self._received[rank] = held.split(b"\n")
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                message = json.loads(line)
                self._state[rank] = message["state"]
                if message["state"] == FAILED:
                    self._cause = self._cause or Cause(str(message["text"]), str(message["joint"]))
        if piece and len(held) <= LONGEST:
            return True
        if self._state[rank] == ALIVE:
            self._state[rank] = GONE
            self._cause = self._cause or Cause(f"rank {rank} of {self.world} {how_it_died(rank)}")
        return False

    def _end(self) -> NoReturn:
        """End this process, whose main thread waits for a rank that will not come."""
        assert self._cause is not None
        if self.fail(self._cause):
            print(one_line(f"tailseg: {self._cause.sentence(self.out)}"), file=sys.stderr, flush=True)
        os._exit(1)


@contextmanager
def watched(fabric: Fabric, out: Path) -> Iterator[Links]:
    """Run a part of a training in all ranks; whatever ends one ends all, and exactly one of them raises the reason.

    Raises:
        UserError: what failed, in the rank that is to tell the user.
        SystemExit: in the others.
        KeyboardInterrupt: stopped by the user.
    """
    with starting():
        links = Links(fabric, out)
    try:
        yield links
    except KeyboardInterrupt:
        if not links.fail(Cause(f"{links.name} was stopped")):
            _quit(130)
        links.end_in_time(130)
        raise
    except LoaderKilledError as error:
        cause = Cause(str(error), "; then ")
        if not links.fail(cause):
            _quit(1)
        links.end_in_time(1)
        raise UserError(cause.sentence(out)) from error
    except UserError as error:
        if not links.fail(Cause(str(error), "")):
            _quit(1)
        links.end_in_time(1)
        raise
    except Exception as error:
        if links.world == 1:
            raise
        found = links.cause() or Cause(f"{links.name} failed ({type(error).__name__}: {error}){_kept(error, out)}")
        if not links.fail(found):
            _quit(1)
        links.end_in_time(1)
        raise UserError(found.sentence(out)) from error
    else:
        links.finish()


def _kept(error: Exception, out: Path) -> str:
    """Write down the traceback of a fault of ours; the rest of a sentence that says where."""
    path = out / TRACEBACK
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return ""
    return f", traceback in {path}"


def _quit(code: int) -> NoReturn:
    _end_in_time(code)
    raise SystemExit(code)


def _end_in_time(code: int) -> None:
    """Once the interpreter ends, give it some seconds: NCCL may wait for ranks that are gone."""
    ending = threading.Event()

    def wait() -> None:
        ending.wait()
        time.sleep(GRACE)
        os._exit(code)

    threading.Thread(target=wait, daemon=True).start()
    atexit.register(ending.set)


# ---------------------------------------------------------------------------------------------------------
# Connections


def _connections(rank: int, world: int) -> dict[int, socket.socket]:
    """A connection to each of the other ranks; a warning names those that cannot be reached."""
    with _listening(world) as listener:
        address, port = listener.getsockname()[:2]
        cards: list[tuple[str, int, str] | None] = [None] * world
        torch.distributed.all_gather_object(cards, (address, port, secrets.token_hex(16)))
        deadline = time.monotonic() + CONNECT  # the first exchange of many machines may have taken long
        found: dict[int, socket.socket] = {}
        for other in range(rank):
            with suppress(OSError):
                card = cards[other]
                assert card is not None
                found[other] = socket.create_connection(card[:2], timeout=CONNECT)
                found[other].sendall(f"{card[2]}{rank:08d}".encode())
        own = cards[rank]
        assert own is not None
        while len(found) < world - 1 and time.monotonic() < deadline:
            listener.settimeout(max(0.1, deadline - time.monotonic()))
            with suppress(OSError, ValueError):
                connection, _ = listener.accept()
                connection.settimeout(2)
                greeting = connection.recv(40, socket.MSG_WAITALL).decode()
                if not hmac.compare_digest(greeting[:32].encode(), own[2].encode()):
                    connection.close()  # a stranger
                    continue
                found[int(greeting[32:])] = connection
    for connection in found.values():
        connection.settimeout(CONNECT)
        _keep_alive(connection)
        _sockets.add(connection)
    missing = [other for other in range(world) if other not in (rank, *found)]
    if missing:
        logger.warning(
            "rank %d cannot reach rank(s) %s over the network: should one die, it is noticed late.",
            rank, ", ".join(map(str, missing)),
        )  # fmt: skip
    return found


def _listening(world: int) -> socket.socket:
    """A socket at the address by which the other ranks reach this machine."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, _, _, _, main = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(main)  # sends nothing
        address = probe.getsockname()[0]
    return socket.create_server((address, 0), family=family, backlog=world)


def _keep_alive(connection: socket.socket) -> None:
    """Let TCP ask for the other machine: dead after 5 + 3 x 4 seconds of silence."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 4), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
