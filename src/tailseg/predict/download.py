"""Pictures from the web: within a time and a size, and by http and https only."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from typing import IO, Any
from urllib.parse import urljoin

from tailseg.errors import UserError

SILENCE_SECONDS = 20.0  # longest wait for the next bytes
TOTAL_SECONDS = 120.0
MOST_BYTES = 256 << 20
_CHUNK = 1 << 16
_SCHEMES = ("http://", "https://")


def is_url(text: str) -> bool:
    """Return whether a text is an address that `download` takes."""
    return text.lower().startswith(_SCHEMES)


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
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    end = time.monotonic() + total
    content = bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "tailseg"})
        with opener.open(request, timeout=silence) as answer:
            while chunk := answer.read1(_CHUNK):  # what is there: `read` would wait for a whole chunk
                content += chunk
                if len(content) > most_bytes:
                    raise UserError(f"{url}: larger than {most_bytes >> 20} MiB; download it and give the file")
                if time.monotonic() > end:
                    raise UserError(f"{url}: not complete after {total:g} s; download it and give the file")
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
        raise UserError(f"{url}: cannot be reached ({error.reason}); check the address and the network") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{url}: cannot be downloaded ({error}); check the address") from None
    return bytes(content)
