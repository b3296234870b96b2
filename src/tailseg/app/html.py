"""Parts of the page that are plain HTML; names from files in them are text, whatever they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
.tailseg-pair { margin: 0 0 1.5rem }
.tailseg-pair div { display: flex; flex-wrap: wrap; gap: .5rem }
.tailseg-pair figure { flex: 1 1 280px; margin: 0; max-width: 560px }
.tailseg-pair img { width: 100%; height: auto; display: block; border-radius: 4px }
.tailseg-pair figcaption { font-size: .85em; opacity: .8 }
.tailseg-pair p, .tailseg-pair ul { margin: .2rem 0; overflow-wrap: anywhere }
.tailseg-facts { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
.tailseg-facts dt { opacity: .8 }
.tailseg-facts dd { margin: 0; overflow-wrap: anywhere }
#class-page svg { max-width: 480px; width: 100%; height: auto }
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


@dataclass(frozen=True, slots=True)
class Pair:
    """An image of the validation set."""

    name: str
    pictures: tuple[str, str] | None  # addresses: with its objects, with the detections; None: it cannot be read
    lines: Sequence[str]  # findings


def pairs(shown: Sequence[Pair]) -> Markup:
    """Truth beside prediction, one image below the other."""
    return joined([_pair(one) for one in shown])


def _pair(one: Pair) -> Markup:
    if one.pictures is None:
        pictures = note("The image cannot be read.")
    else:
        figure = Markup('<figure><img src="{}" alt="{}" loading="lazy"><figcaption>{}</figcaption></figure>')
        sides = zip(one.pictures, ("annotated", "found"), strict=True)
        pictures = joined([figure.format(address, text(f"{one.name}, {side}"), side) for address, side in sides])
    lines = joined([Markup("<li>{}</li>").format(text(line)) for line in one.lines])
    return Markup('<section class="tailseg-pair"><p><b>{}</b></p><div>{}</div><ul>{}</ul></section>').format(
        text(one.name), pictures, lines
    )


def facts(title: str, rows: Mapping[str, str]) -> Markup:
    """A heading over names and values."""
    items = joined([Markup("<dt>{}</dt><dd>{}</dd>").format(name, text(value)) for name, value in rows.items()])
    return Markup('<h2>{}</h2><dl class="tailseg-facts">{}</dl>').format(text(title), items)


def subheading(title: str) -> Markup:
    """A heading of a part."""
    return Markup("<h3>{}</h3>").format(text(title))


def joined(parts: Sequence[str]) -> Markup:
    """Parts one after the other."""
    return Markup("").join(parts)


def heading(title: str) -> Markup:
    """The page's heading."""
    return Markup("<h1>{}</h1>").format(text(title))
