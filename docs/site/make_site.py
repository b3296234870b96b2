"""Gather the pages of the documentation site into build/pages and build it: `make docs`.

Most pages are the files of docs/ and of the repository's root as they are; links that lead out of the site become links
to the repository, and Markdown that GitHub takes and mkdocs does not is put right. The reference pages are made of the
program (`reference.py`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import reference
import yaml

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "build" / "pages"
REPOSITORY = "https://github.com/tailseg/tailseg/blob/main/"
OURS = re.compile(
    r"https://(?:github\.com/tailseg/tailseg/(?:blob|tree)|raw\.githubusercontent\.com/tailseg/tailseg)/main/"
)
# Files of the root that are pages of the site, too.
OF_THE_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "architecture.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}


def sources() -> dict[str, Path]:
    """Every page that is a file, by its place on the site."""
    found = {place: ROOT / name for name, place in OF_THE_ROOT.items()}
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix in (".md", ".ipynb"):
            found[path.relative_to(ROOT / "docs").with_suffix(".md").as_posix()] = path
    return found


def gather(out: Path) -> None:
    """Write all pages and pictures below ``out``, which is emptied first."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs" / "images", out / "images")
    shutil.copy(ROOT / "docs" / "site" / "math.js", out / "math.js")
    pages = sources()
    places = {path.relative_to(ROOT).as_posix(): place for place, path in pages.items()}
    for place, path in pages.items():
        text = notebook_text(path) if path.suffix == ".ipynb" else path.read_text()
        write(out / place, page_text(text, path, place, places))
    for place, text in reference.pages().items():
        write(out / place, "\n".join(map(bars_bare, text.splitlines())) + "\n")


def write(path: Path, text: str) -> None:
    """Write a page, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def notebook_text(path: Path) -> str:
    """A notebook as Markdown, with a link to the file."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    link = f"[This page as a notebook]({REPOSITORY}{path.relative_to(ROOT).as_posix()})"
    return "\n\n".join([parts[0], link, *parts[1:]]) + "\n"


def page_text(text: str, path: Path, place: str, places: dict[str, str]) -> str:
    """A page as the site has it.

    Args:
        text: of the file.
        path: of the file.
        place: of the page on the site.
        places: of all pages, by their files' paths in the repository.
    """
    lines = [
        line
        if in_code
        else re.sub(r"(?<=\]\()[^)\s]+", lambda link: target(link[0], path, place, places), bars_bare(line))
        for in_code, line in marked(text)
    ]
    return "\n".join(spaced(lines)) + "\n"


def marked(text: str) -> Iterator[tuple[bool, str]]:
    """Lines with whether they are code; formulas lose their fence."""
    fence = ""
    for line in text.splitlines():
        if line.strip().startswith("```"):
            word = line.strip().removeprefix("```")
            if word == "math" or (fence == "math" and not word):
                yield False, "$$"
            else:
                yield True, line
            fence = "" if fence else word or "text"
        else:
            yield bool(fence), line


def bars_bare(line: str) -> str:
    """A line of a table with the bars in its code as they are; GitHub wants a backslash before them."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line


def spaced(lines: list[str]) -> Iterator[str]:
    """Lines with an empty one before a list or a table that follows a paragraph, as mkdocs needs it."""
    before, in_code = "", False
    for line in lines:
        in_code ^= before.startswith("```")
        for begin in ("- ", "|"):
            starts = line.startswith(begin) and not before.startswith((begin, " ", "#")) and before.strip()
            if starts and not in_code and not line.startswith("```"):
                yield ""
        yield line
        before = line


def target(link: str, path: Path, place: str, places: dict[str, str]) -> str:
    """The target of a link as the site has it."""
    name, mark, anchor = link.partition("#")
    if OURS.match(name):
        inside = OURS.sub("", name)
    elif re.match(r"\w+:", name) or not name:
        return link
    else:
        inside = Path(os.path.normpath(path.parent / name)).relative_to(ROOT).as_posix()
    if inside in places:
        aim = places[inside]
    elif inside.startswith("docs/images/"):
        aim = inside.removeprefix("docs/")
    else:
        return f"{REPOSITORY}{inside}{mark}{anchor}"
    return os.path.relpath(aim, Path(place).parent) + mark + anchor


def configure(out: Path) -> Path:
    """Write the configuration of the site of the pages ``out`` beside them; returns its file."""
    config = {
        "INHERIT": os.path.relpath(ROOT / "mkdocs.yml", out.parent),
        "docs_dir": out.name,
        "site_dir": "site",
    }
    path = out.parent / "mkdocs.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def command(config: Path) -> list[str]:
    """The command that builds the site; any warning is an error, which `--quiet` would undo."""
    return [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]


if __name__ == "__main__":
    gather(PAGES)
    line = command(configure(PAGES))
    sys.exit(subprocess.run(line, env={**os.environ, "NO_MKDOCS_2_WARNING": "true"}).returncode)
