"""Six sets of icons and some photographs, rendered into one file that can travel (`icons.py fetch`).

A class is a name that at least three sets draw, each in its own style: an object of many looks, as in photographs.
The sets come from the npm registry, by the npm client and whichever registry it is set to; digests are checked here,
of the archives one known file is read, in memory, and nothing in them is run.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tailseg.errors import UserError

Pixels = NDArray[np.uint8]

CLASSES = 1203  # as many as LVIS v1
FEWEST_STYLES = 3  # of a class, the held-out one among them
SIZE = 96  # pixels, the longer side of a rendered icon
PHOTO_SIZE = 256  # pixels, the shorter side of a photograph
ALIKE = 0.04  # root mean square difference, of 1, below which two icons of a set are the same picture
MOST_PACKED, MOST_UNPACKED = 20_000_000, 80_000_000  # bytes of a set


@dataclass(frozen=True, slots=True)
class Style:
    """A set on npm and whom to thank for it."""

    name: str
    version: str
    sha256: str  # of the package
    licence: str
    author: str

    @property
    def package(self) -> str:
        return f"@iconify-json/{self.name}"


STYLES = (
    Style(
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
        "Noto Emoji, Google Inc",
    ),
    Style(
        "noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
        "Noto Emoji (v1), Google Inc",
    ),
    Style(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
        "Fluent Emoji Flat, Microsoft Corporation",
    ),
    Style(
        "fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
        "Firefox OS Emoji, Mozilla",
    ),
    Style(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
        "Emoji One (Colored), EmojiOne and EmojiTwo",
    ),
    Style(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
        "Twemoji, Twitter, Inc and other contributors",
    ),
)
HELD_OUT = "twemoji"  # never trained on; it draws nearly every class


def attribution() -> str:
    """One line on the sets, as their licences ask for it."""
    return "; ".join(f"{style.author} ({style.package} {style.version}, {style.licence})" for style in STYLES)


# ---------------------------------------------------------------------------------------------------------
# From the registry


def download(style: Style, folder: Path) -> bytes:
    """The package of a set.

    Raises:
        UserError: without npm, without a registry, or where the package is not the one that is expected.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("npm was not found; install Node.js, whose client fetches the icon sets.")
    wanted = f"{style.package}@{style.version}"
    command = [npm, "pack", wanted, "--ignore-scripts", "--json", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = sorted(folder.glob(f"*{style.name}-{style.version}.tgz"))
    if done.returncode != 0 or len(found) != 1:
        said = (done.stderr.strip() or "no file").splitlines()[0]
        raise UserError(f"npm could not fetch {wanted} ({said}); check `npm config get registry` and the network.")
    if found[0].stat().st_size > MOST_PACKED:
        raise UserError(f"{wanted} has more than {MOST_PACKED:,} bytes; it is not the package that is expected.")
    content = found[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != style.sha256:
        raise UserError(f"{wanted} differs from the one that this script was written for; see STYLES in {__file__}.")
    return content


def icons_of(package: bytes, style: Style) -> tuple[dict[str, str], int]:
    """Names to drawings (SVG) of a set, without colours of skin, and how many icons are not plain drawings.

    Raises:
        UserError: where the package lacks a readable ``package/icons.json`` of a sane size.
    """
    place = f"{style.package} {style.version}"
    try:
        with tarfile.open(fileobj=io.BytesIO(package), mode="r:gz") as archive:
            member = archive.getmember("package/icons.json")
            if not member.isfile() or member.size > MOST_UNPACKED:
                raise UserError(f"{place}: package/icons.json is no file of at most {MOST_UNPACKED:,} bytes.")
            file = archive.extractfile(member)
            assert file is not None
            content = json.loads(file.read(MOST_UNPACKED))
    except (tarfile.TarError, KeyError, ValueError, EOFError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place}: package/icons.json cannot be read ({error}); fetch it again.") from error
    icons = {name: icon for name, icon in content["icons"].items() if "skin-tone" not in name}
    drawn = {name: svg(icon, content) for name, icon in icons.items() if is_drawing(icon["body"])}
    return drawn, len(icons) - len(drawn)


def is_drawing(body: str) -> bool:
    """Whether an SVG consists of shapes alone and refers to nothing outside itself."""
    return not re.search(r"<(image|script|foreignObject|text)\b|href=[\"'](?!#)|url\([\"']?(?!#)", body)


def svg(icon: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """A whole SVG file, square, of an icon as Iconify writes it."""
    left, top, width, height = (
        icon.get(side, defaults.get(side, default))
        for side, default in {"left": 0, "top": 0, "width": 16, "height": 16}.items()
    )
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{box}">{icon["body"]}</svg>'


# ---------------------------------------------------------------------------------------------------------
# Names to classes


def shared_names(sets: Mapping[str, Mapping[str, Any]], fewest: int) -> dict[str, dict[str, str]]:
    """Names that at least ``fewest`` sets have -> {set: its own name}.

    The sets write a name with hyphens or without; the first set's way of writing is kept, with ``_`` for them.
    """
    found: dict[str, dict[str, str]] = {}
    for style, icons in sets.items():
        for name in icons:
            found.setdefault(re.sub("[^a-z0-9]", "", name.lower()), {}).setdefault(style, name)
    shared = (own for own in found.values() if len(own) >= fewest)
    return {next(iter(own.values())).replace("-", "_"): own for own in shared}


def without_twins(looks: Mapping[str, Mapping[str, Pixels]]) -> list[str]:
    """The classes that can be told apart: of two that one set draws alike, or as mirror images, one is left out.

    Kept is the class with more styles, then the first in the order of the names.

    Args:
        looks: class -> {style: (h, w, 4) uint8}.
    """
    order = sorted(looks, key=lambda name: (-len(looks[name]), name))
    place = {name: index for index, name in enumerate(order)}
    alike = np.zeros((len(order), len(order)), bool)
    for style in sorted({style for own in looks.values() for style in own}):
        names = [name for name in order if style in looks[name]]
        small = np.stack([_thumbnail(looks[name][style]) for name in names])
        flat, mirrored = (view.reshape(len(names), -1) for view in (small, small[:, :, ::-1]))
        norms = (flat**2).sum(axis=1)
        products = np.maximum(flat @ flat.T, flat @ mirrored.T)
        difference = (norms[:, None] + norms - 2 * products) / flat.shape[1]
        where = [place[name] for name in names]
        alike[np.ix_(where, where)] |= difference < ALIKE**2
    kept: list[int] = []
    for index in range(len(order)):
        if not alike[index, kept].any():
            kept.append(index)
    return sorted(order[index] for index in kept)


def _thumbnail(icon: Pixels) -> NDArray[np.float32]:
    """(24, 24, 4) in [0, 1], colours multiplied by alpha."""
    premultiplied = icon.astype(np.float32) / 255
    premultiplied[..., :3] *= premultiplied[..., 3:]
    small: NDArray[np.float32] = cv2.resize(premultiplied, (24, 24), interpolation=cv2.INTER_AREA)
    return small


# ---------------------------------------------------------------------------------------------------------
# The file


def renderer() -> Callable[[str], Pixels | None]:
    """A function from an SVG to its BGRA pixels, cut to what can be seen; None where nothing can.

    Raises:
        UserError: without resvg-py.
    """
    try:
        resvg = importlib.import_module("resvg_py")
    except ImportError as error:
        raise UserError("rendering needs resvg-py; install it with `pip install resvg-py`.") from error

    def render(text: str) -> Pixels | None:
        png = resvg.svg_to_bytes(svg_string=text, width=SIZE, height=SIZE, skip_system_fonts=True)
        pixels: Any = cv2.imdecode(np.frombuffer(bytes(png), np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels.ndim != 3 or pixels.shape[2] != 4:
            return None
        seen = pixels[..., 3] >= 128
        if seen.sum() < SIZE:  # hairlines make no mask
            return None
        ys, xs = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        cut: Pixels = pixels[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        return cut

    return render


def photographs(folder: Path) -> tuple[list[bytes], list[bool]]:
    """The pictures of a data set, made small, as JPEG; and which of them belong to its training split.

    Raises:
        UserError: where the folder lacks a file.
    """
    pictures, of_train = [], []
    for split in ("train", "val"):
        try:
            rows = json.loads((folder / f"{split}.json").read_text())["images"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder / f'{split}.json'} cannot be read ({error}); name a data set.") from error
        for row in rows:
            path = folder / "images" / (row.get("file_name") or row["coco_url"]).rpartition("/")[2]
            picture: Any = cv2.imread(str(path)) if path.is_file() else None
            if picture is None:
                raise UserError(f"{path} is no picture; the photographs are those of {folder / f'{split}.json'}.")
            scale = PHOTO_SIZE / min(picture.shape[:2])
            small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            pictures.append(bytes(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]))
            of_train.append(split == "train")
    return pictures, of_train


def choose(looks: Mapping[str, Mapping[str, Pixels]]) -> list[str]:
    """``CLASSES`` of the classes, those that digests of their names put first: any class has the same chance."""
    names = [name for name, own in looks.items() if HELD_OUT in own]
    return sorted(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:CLASSES])


def write_archive(path: Path, looks: Mapping[str, Mapping[str, Pixels]], photos: list[bytes], train: list[bool]) -> int:
    """Write classes and photographs; returns the bytes of the file. Icons are lossless WebP."""
    names, styles = sorted(looks), [style.name for style in STYLES]
    keys = [(c, styles.index(style)) for c, name in enumerate(names) for style in looks[name]]
    quality = [cv2.IMWRITE_WEBP_QUALITY, 101]  # beyond 100 is lossless
    icons = [bytes(cv2.imencode(".webp", looks[names[c]][styles[s]], quality)[1]) for c, s in keys]
    about = {"names": names, "styles": [asdict(style) for style in STYLES], "held_out": HELD_OUT, "size": SIZE}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(
            file,
            about=np.array(json.dumps(about)),
            icons=np.frombuffer(b"".join(icons), np.uint8),
            icon_ends=np.cumsum([len(icon) for icon in icons]),
            icon_class=np.array([c for c, _ in keys]),
            icon_style=np.array([s for _, s in keys]),
            photos=np.frombuffer(b"".join(photos), np.uint8),
            photo_ends=np.cumsum([len(photo) for photo in photos]),
            photo_train=np.array(train, bool),
        )
    return path.stat().st_size


class Archive:
    """What `icons.py fetch` wrote.

    Raises:
        UserError: where the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                self._arrays = {name: file[name] for name in file.files}
            about = json.loads(str(self._arrays["about"]))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); make it with `icons.py fetch`.") from error
        self.names: list[str] = about["names"]
        self.styles: list[dict[str, str]] = about["styles"]
        self.held_out = [style["name"] for style in self.styles].index(about["held_out"])
        self._rows: dict[tuple[int, int], int] = {
            (int(c), int(s)): row
            for row, (c, s) in enumerate(zip(self._arrays["icon_class"], self._arrays["icon_style"], strict=True))
        }

    def styles_of(self, label: int) -> list[int]:
        return [style for style in range(len(self.styles)) if (label, style) in self._rows]

    def icon(self, label: int, style: int) -> Pixels:
        """(h, w, 4) BGRA."""
        picture = self._picture("icon", self._rows[label, style])
        if picture.shape[2] == 4:
            return picture
        return np.concatenate([picture, np.full_like(picture[..., :1], 255)], axis=2)  # WebP stores no full alpha

    @cached_property
    def photos(self) -> dict[bool, list[Pixels]]:
        """The photographs of training (True) and of validation (False)."""
        found: dict[bool, list[Pixels]] = {True: [], False: []}
        for row, of_train in enumerate(self._arrays["photo_train"].tolist()):
            found[of_train].append(self._picture("photo", row))
        return found

    def _picture(self, kind: str, row: int) -> Pixels:
        ends = self._arrays[f"{kind}_ends"]
        start = 0 if row == 0 else ends[row - 1]
        picture: Any = cv2.imdecode(self._arrays[f"{kind}s"][start : ends[row]], cv2.IMREAD_UNCHANGED)
        pixels: Pixels = picture
        return pixels


def fetch(out: Path, photo_folder: Path) -> list[str]:
    """Download, match, render and write; returns lines on what was found."""
    render = renderer()
    photos, of_train = photographs(photo_folder)
    with tempfile.TemporaryDirectory() as scratch:
        found = {style.name: icons_of(download(style, Path(scratch)), style) for style in STYLES}
    sets = {style: icons for style, (icons, _) in found.items()}
    names = shared_names(sets, FEWEST_STYLES)
    looks: dict[str, dict[str, Pixels]] = {}
    for name, own in names.items():
        drawn = {style: render(sets[style][theirs]) for style, theirs in own.items()}
        looks[name] = {style: pixels for style, pixels in drawn.items() if pixels is not None}
    visible = {name: own for name, own in looks.items() if len(own) >= FEWEST_STYLES}
    apart = {name: visible[name] for name in without_twins(visible)}
    chosen = choose(apart)
    size = write_archive(out, {name: apart[name] for name in chosen}, photos, of_train)
    by_styles = [sum(len(own) == n for own in names.values()) for n in range(FEWEST_STYLES, len(STYLES) + 1)]
    icons = {style.name: sum(style.name in apart[name] for name in chosen) for style in STYLES}
    return [
        f"{sum(map(len, sets.values())):,} icons, colours of skin not counted; left out as no plain drawings: "
        f"{sum(undrawn for _, undrawn in found.values()):,}",
        f"{len(names):,} names are drawn in at least {FEWEST_STYLES} styles: "
        + ", ".join(f"{count:,} in {n}" for n, count in enumerate(by_styles, FEWEST_STYLES)),
        f"{len(names) - len(visible):,} of them show too little, {len(visible) - len(apart):,} look like another one "
        f"in some style; {sum(HELD_OUT in own for own in apart.values()):,} of the {len(apart):,} others exist in "
        f"{HELD_OUT}, the style held out; taken are {len(chosen):,}",
        "Icons by style: " + ", ".join(f"{style} {count:,}" for style, count in icons.items()),
        f"{out}: {sum(icons.values()):,} icons of {SIZE} px, {len(photos)} photographs of {PHOTO_SIZE} px, "
        f"{size / 1e6:.1f} MB",
        f"Icons: {attribution()}.",
    ]
