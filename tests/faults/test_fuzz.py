"""Damaged files of every kind that we read: a sentence or a value, never another exception, at once."""

import json
import random
import re
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml
from fault_tools import damaged, times
from fuzz_kinds import KINDS

from tailseg.checkpoint import read_tensors, write_tensors
from tailseg.errors import UserError

LONGEST = 5.0  # seconds that a small file may take
MOST = 1 << 20  # kilobytes that small files may take


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(sound: bytes, rng: random.Random) -> tuple[bytes, list[str]]:
        content, faults = sound, []
        for _ in range(rng.choice((1, 1, 2, 5))):
            what, content = damaged(content or b"x", rng)
            faults.append(what)
        return content, faults

    fuzz(tmp_path, kind, change, monkeypatch)


JSON = (
    "annotations",
    "annotations with errors",
    "COCO import",
    "results",
    "labelme",
    "labelme with pixels",
    "Label Studio",
    "Supervisely",
    "Supervisely's meta.json",
    "VIA",
    "log",
)
YAML = ("recipe", "data YAML", "YOLO data.yaml", "detectron2's config")
XML = ("VOC", "CVAT")
WORDS = ("YOLO labels", "--set", "mmdetection's config")
HEADERS = ("model", "recipe of a model")


@pytest.mark.parametrize("kind", [*JSON, *YAML, *XML, *WORDS, *HEADERS])
def test_other_values(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Well-formed files with other values, or without some."""

    def change(sound: bytes, rng: random.Random) -> tuple[bytes, list[str]]:
        count = rng.choice((1, 1, 2, 5))
        if kind in XML or kind in WORDS:
            return with_other_words(sound, XML_WORD if kind in XML else WORD, count, rng)
        if kind in HEADERS:
            return with_other_header(tmp_path / "forged", sound, count, rng)
        content = yaml.safe_load(sound) if kind in YAML else [json.loads(line) for line in sound.splitlines()]
        faults = [exchange(content, rng) for _ in range(count)]
        if kind in YAML:
            return yaml.dump(content, Dumper=PlainDumper).encode(), faults
        return b"\n".join(json.dumps(line).encode() for line in content), faults

    fuzz(tmp_path, kind, change, monkeypatch)


class PlainDumper(yaml.SafeDumper):
    """Writes values that occur twice in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def fuzz(
    tmp_path: Path,
    kind: str,
    change: Callable[[bytes, random.Random], tuple[bytes, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read changed files of a kind: nothing but a UserError may come of them, and soon, in little memory."""
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    make, use = KINDS[kind]
    (tmp_path / "set").mkdir()
    path = make(tmp_path / "set")
    sound = path.read_bytes()
    use(path)
    before = peak()
    rng = random.Random(kind)
    for _ in range(times(10, 500) if kind in HEADERS else times(25, 3000)):  # a recipe takes longer than a file
        content, faults = change(sound, rng)
        check(path, content, use, faults)
        assert peak() - before < MOST, faults


def peak() -> int:
    """Kilobytes, the most that this process has taken."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check(path: Path, content: bytes, use: Callable[[Path], Any], faults: list[str]) -> None:
    """Use the file with this content: nothing but a UserError may come of it, and soon."""
    path.write_bytes(content)
    started = time.process_time()
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(60)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on broken files
            use(path)
    except UserError as error:
        sentence = str(error)
    except Exception as error:
        raise AssertionError(f"{faults}: {type(error).__name__}: {error}; {content[:2000]!r}") from error
    else:
        sentence = ""
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "\n" not in sentence, (faults, sentence)
    assert time.process_time() - started < LONGEST, (faults, content[:2000])


def _hangs(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError("a minute")


VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e308, -1e308, 2**31, 2**53 + 1, 2**63, 2**64 - 1, -(2**63), 10**30),
    *("", "a", "0", "nan", "../x", "\\", "\0", "\ud800", "\u202e", "x" * 300, "/etc/passwd"),
    *([], [[]], [1, 2], [1] * 7, [[1, 2, 3, 4, 5, 6]], [None], [[None] * 6], [{"a": 1}], {}, {"size": [40, 80]}),
    *({"counts": "0", "size": [40, 80]}, {"counts": [3200], "size": [40, 80]}, {"counts": [], "size": [65535, 65535]}),
]


def exchange(content: Any, rng: random.Random) -> str:
    """Put another value somewhere into JSON content, or take one out; says what was done."""
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk(content)
    if not places:
        return "nothing"
    parent, key = rng.choice(places)
    if rng.random() < 0.2:
        del parent[key]
        return f"{key!r} taken out"
    parent[key] = json.loads(json.dumps(rng.choice(VALUES)))
    return f"{key!r} is {str(parent[key])[:40]!r}"


WORD = re.compile(rb"[^\s=(),{}:'\"\[\]]+")
XML_WORD = re.compile(rb"(?<=>)[^<>]+(?=<)|(?<==\")[^\"]*(?=\")|(?<=[<,;])[^<>,;/ ]+")


def with_other_words(sound: bytes, word: re.Pattern[bytes], count: int, rng: random.Random) -> tuple[bytes, list[str]]:
    """A text with some of its words exchanged for others."""
    faults = []
    for _ in range(count):
        found = rng.choice(list(word.finditer(sound)) or [None])
        if found is None:
            break
        value = (
            str(rng.choice(VALUES)).encode(errors="replace") if rng.random() < 0.8 else found[0] * rng.choice((2, 99))
        )
        faults.append(f"{found[0][:40]!r} is {value[:40]!r}")
        sound = sound[: found.start()] + value + sound[found.end() :]
    return sound, faults


def with_other_header(forged: Path, sound: bytes, count: int, rng: random.Random) -> tuple[bytes, list[str]]:
    """A model with another header, and the checksum of that."""
    forged.write_bytes(sound)
    tensors, about = read_tensors(forged)
    faults = [exchange(about, rng) for _ in range(count)]
    write_tensors(forged, tensors, {str(key): value for key, value in about.items()})
    return forged.read_bytes(), faults
