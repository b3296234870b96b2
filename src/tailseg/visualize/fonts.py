"""Fonts in which a text can be read: DejaVu Sans, else one of the machine's that has all of the characters."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont, features

from tailseg.wording import short

log = logging.getLogger(__name__)

# Comes with matplotlib, so that pictures look the same on every machine. It has Latin, Greek, Cyrillic, Armenian,
# Georgian, Hebrew and Arabic letters.
DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
# In names of files, from the first wish to the last: fonts of one weight for many scripts before those for one.
_WISHES = ("notosanscjk", "sourcehansans", "notosans", "sans", "gothic", "regular")
_LAST = ("bold", "black", "light", "thin", "italic", "oblique", "mono", "serif", "emoji")
_NEVER = "lastresort"  # has a picture of its script in place of each character


class Fonts:
    """Finds a font for a text among files.

    Args:
        files: called once, when a text cannot be written in DejaVu Sans; paths of fonts (.ttf, .otf, .ttc).
    """

    def __init__(self, files: Callable[[], Sequence[str]]) -> None:
        self._files = cache(lambda: sorted(files(), key=_order))
        self._good = {DEJAVU: _characters(DEJAVU)}  # fonts that had what a text needed: asked first
        self._all: frozenset[int] | None = None  # characters of all fonts, known when one was sought in vain
        self._told = False

    def covering(self, text: str) -> Path | None:
        """The font file that has all characters of a text; None where no file has, or they cannot be set."""
        wanted = {ord(sign) for sign in text if not sign.isspace()}
        if _needs_shaping(text) and not features.check("raqm"):
            return None
        for path, found in self._good.items():
            if wanted <= found:
                return path
        if self._all is not None and not wanted <= self._all:
            return None
        met: set[int] = set(self._good[DEJAVU])
        for path in map(Path, self._files()):
            found = _characters(path)
            if wanted <= found:
                self._good[path] = found
                return path
            met |= found
        self._all = frozenset(met)
        return None

    def font(self, text: str, size: int) -> ImageFont.FreeTypeFont:
        """A font of ``size`` pixels for a text; DejaVu Sans where none covers it."""
        return _opened(self.covering(text) or DEJAVU, size)

    def legible(self, name: str, category_id: int) -> str:
        """The name of a category, or its id where no font has the name's characters.

        The first such name is said in a warning.
        """
        name = unicodedata.normalize("NFC", name)  # letters with their accents, as fonts have them
        if self.covering(name) is not None:
            return name
        if not self._told:
            self._told = True
            log.warning(
                "no font on this machine has the characters of the name %s: such classes are drawn by their ids; "
                "install a font that has them, such as Noto Sans CJK",
                short(name),
            )
        return f"id {category_id}"


@cache
def machine_fonts() -> Fonts:
    """DejaVu Sans and the fonts that are installed on this machine."""
    return Fonts(font_manager.findSystemFonts)


def _order(name: str) -> tuple[bool, int, str]:
    """Sort key of font files: those that are likely to suit first."""
    stem = Path(name).stem.lower()
    wish = next((place for place, part in enumerate(_WISHES) if part in stem), len(_WISHES))
    return any(part in stem for part in _LAST), wish, name


def _characters(path: Path) -> frozenset[int]:
    """The characters of a font that Pillow can draw in any size; none if the file cannot be read as such."""
    if _NEVER in path.stem.lower():
        return frozenset()
    try:
        font = FT2Font(str(path))
        _opened(path, 16)
    except (OSError, RuntimeError, ValueError):
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()


@lru_cache(maxsize=64)
def _opened(path: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), size)


def _needs_shaping(text: str) -> bool:
    """Letters that run from right to left, change with their neighbours, or have marks above them."""
    return any(unicodedata.bidirectional(s) in ("R", "AL") or unicodedata.category(s) in ("Mn", "Mc") for s in text)
