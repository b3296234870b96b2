"""Pictures from the web: within a time and a size, and by http and https only."""

from __future__ import annotations

import http.client
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, Any
from urllib.parse import quote, urljoin

from tailseg.errors import UserError

SILENCE_SECONDS = 20.0  # longest wait for the next bytes
TOTAL_SECONDS = 120.0
MOST_BYTES = 256 << 20
_CHUNK = 1 << 16
_SAFE = "%/:?#[]@!$&'()*+,;=~"  # in an address besides letters and digits
_SCHEMES = ("http://", "https://")


def is_url(text: str) -> bool:
    """Return whether a text is an address that `download` takes."""
    return text.lower().startswith(_SCHEMES)


def _in_ascii(url: str) -> str:
    """An address as servers take it: international names of hosts by IDNA, other letters and spaces as %E4."""
    scheme, slashes, after = url.partition("://")
    place = re.split("[/?#]", after, maxsplit=1)[0]
    rest = quote(after[len(place) :], safe=_SAFE)
    if not place.isascii():
        user, at, host = place.rpartition("@")
        name, colon, port = host.partition(":")
        place = f"{user}{at}{name.encode('idna').decode()}{colon}{port}"
    return scheme + slashes + place + rest


class _Connections:
    """Makes connections whose sockets are known, so that they can be shut while a read waits."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def open(self, kind: type[http.client.HTTPConnection], host: str, **options: Any) -> http.client.HTTPConnection:
        connection, sockets = kind(host, **options), self._sockets
        connect = connection.connect

        def known() -> None:
            connect()
            sockets.append(connection.sock)

        connection.connect = known  # type: ignore[method-assign]
        return connection

    @contextmanager
    def shut_after(self, seconds: float) -> Iterator[None]:
        """Shut all connections, also those that are still to come, when the block takes longer."""
        finished = threading.Event()

        def shut() -> None:
            wait = seconds
            while not finished.wait(wait):
                wait = 0.2
                for one in self._sockets:
                    with suppress(OSError):  # it is closed
                        one.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=shut, daemon=True).start()
        try:
            yield
        finally:
            finished.set()


class _Http(urllib.request.HTTPHandler):
    def __init__(self, connections: _Connections) -> None:
        super().__init__()
        self._open = partial(connections.open, http.client.HTTPConnection)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Open a connection."""
        return self.do_open(self._open, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, connections: _Connections) -> None:
        super().__init__()
        self._open = partial(connections.open, http.client.HTTPSConnection)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        """Open a connection."""
        return self.do_open(self._open, req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https; the standard library would follow to ftp too."""

    def http_error_302(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
    ) -> Any:
        """Follow a redirect (UserError if it leads to another protocol)."""
        place = urljoin(req.full_url, headers.get("location") or "")
        if not is_url(place):
            raise UserError(f"{req.full_url}: leads on to {place}, which is not http or https; download it by hand")
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def download(
    url: str,
    *,
    silence: float = SILENCE_SECONDS,
    total: float = TOTAL_SECONDS,
    most_bytes: int = MOST_BYTES,
) -> bytes:
    """The content behind an http or https address.

    Args:
        url: the address.
        silence: seconds to wait for the next bytes.
        total: seconds for all of it.
        most_bytes: of the content.

    Raises:
        UserError: no such server or page, an address that is none, a redirect to another protocol, too slow, or too
            large.
    """
    opener, connections = urllib.request.OpenerDirector(), _Connections()
    for handler in (
        urllib.request.ProxyHandler(),
        _Http(connections),
        _Https(connections),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    end = time.monotonic() + total
    content = bytearray()
    late = UserError(f"{url}: not complete after {total:g} s; download it and give the file")
    try:
        request = urllib.request.Request(_in_ascii(url), headers={"User-Agent": "tailseg"})
        with connections.shut_after(total), opener.open(request, timeout=silence) as answer:
            while chunk := answer.read1(_CHUNK):  # what is there: `read` would wait for a whole chunk
                content += chunk
                if len(content) > most_bytes:
                    raise UserError(f"{url}: larger than {most_bytes >> 20} MiB; download it and give the file")
                if time.monotonic() > end:
                    raise late
            if time.monotonic() > end:
                raise late
            missing = getattr(answer, "length", None)
            if missing:
                raise UserError(f"{url}: the connection broke {missing} bytes before the end; try again")
    except urllib.error.HTTPError as error:
        reason = str(error.reason).partition("\n")[0]  # more lines tell of a redirect in circles
        raise UserError(f"{url}: the server answers {error.code} {reason}; check the address") from None
    except TimeoutError:
        raise UserError(f"{url}: no answer for {silence:g} s; try again later, or download it by hand") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise UserError(f"{url}: no answer for {silence:g} s; try again later, or download it by hand") from None
        if time.monotonic() > end:
            raise late from None
        raise UserError(f"{url}: cannot be reached ({error.reason}); check the address and the network") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if time.monotonic() > end:
            raise late from None
        raise UserError(f"{url}: cannot be downloaded ({error}); check the address") from None
    return bytes(content)
