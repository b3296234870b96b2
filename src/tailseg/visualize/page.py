"""HTML pages from the templates beside this module.

A page is one file that needs no network, follows the reader's light or dark setting, and fits a phone. Tables of
classes are sorted and searched, and the curves of an analysis chosen, by JavaScript that stands in the page; without it
they can be read too.
"""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tailseg.wording import controls_escaped

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(template: str, **content: object) -> str:
    """The page that a template makes of its content.

    Args:
        template: file name in the folder ``templates``.
        content: variables of the template; text is escaped, `markupsafe.Markup` (a chart) stands as it is. Control
            characters are escaped in either.

    Raises:
        jinja2.UndefinedError: the template uses a variable that ``content`` lacks.
    """
    return controls_escaped(ENVIRONMENT.get_template(template).render(content))


def data_uri(picture: bytes, kind: str) -> str:
    """The address of a picture that holds the picture itself; ``kind`` is its MIME type, "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(picture).decode('ascii')}"
