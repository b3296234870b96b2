"""Parts of the page that are plain HTML; names from files in them are text, whatever they hold."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlencode

from markupsafe import Markup, escape

from tailseg.app.pictures import Choice
from tailseg.visualize.page import data_uri
from tailseg.wording import controls_escaped

STYLE = """
.tailseg-picture img { max-width: 100%; height: auto; display: block; margin: 0 auto; border-radius: 4px }
.tailseg-links { display: flex; flex-wrap: wrap; gap: .5rem }
.tailseg-links a { flex: 1 1 auto; text-align: center; padding: .45rem .8rem; border-radius: 6px; text-decoration: none;
  border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill);
  color: var(--button-secondary-text-color) }
.tailseg-links a:hover { background: var(--button-secondary-background-fill-hover) }
.tailseg-faults { border-left: 4px solid #d55e00; padding: .3rem .8rem; margin: .3rem 0; overflow-wrap: anywhere }
.tailseg-note { overflow-wrap: anywhere; margin: .4rem 0 }
"""


def text(value: str) -> Markup:
    """A text as HTML, its control characters escaped."""
    return escape(controls_escaped(value))


def picture(jpeg: bytes, about: str) -> Markup:
    """A picture that stands in the page itself, so that the server keeps no file of it; ``about`` describes it."""
    return Markup('<figure class="tailseg-picture"><img src="{}" alt="{}"></figure>').format(
        data_uri(jpeg, "image/jpeg"), text(about)
    )


def note(sentence: str) -> Markup:
    """A line."""
    return Markup('<p class="tailseg-note">{}</p>').format(text(sentence))


def faults(sentences: Sequence[str]) -> Markup:
    """The pictures that could not be read; nothing without any."""
    lines = Markup("").join(Markup("<div>{}</div>").format(text(one)) for one in sentences)
    return Markup('<div class="tailseg-faults" role="alert">{}</div>').format(lines) if sentences else Markup("")


def links(key: str, choice: Choice) -> Markup:
    """What can be downloaded of the pictures of a session."""
    query = urlencode([("score", f"{choice.score:g}"), *(("label", label) for label in sorted(choice.labels))])
    names = {"json": "JSON", "coco": "COCO", "pictures": "Pictures"}
    parts = [
        Markup('<a href="download/{}/{}?{}" download>{}</a>').format(key, kind, query, name)
        for kind, name in names.items()
    ]
    return Markup('<div class="tailseg-links">{}</div>').format(Markup("").join(parts))


def heading(title: str) -> Markup:
    """The page's heading."""
    return Markup("<h1>{}</h1>").format(text(title))
