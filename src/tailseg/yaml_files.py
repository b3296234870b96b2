"""YAML of users and other tools: plain values only, of bounded size and depth; every fault is one sentence."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import yaml

from tailseg.errors import UserError

LARGEST = 1_000_000  # bytes of a file
DEEPEST = 50  # lists and mappings in each other
MOST_ALIASES = 100  # where they are read at all
LONGEST_NUMBER = 40  # letters of a whole number
_SafeLoader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML has it


class _ValueLoader(_SafeLoader):  # type: ignore[misc]
    """Reads whole numbers of at most 64 bits; 1:30, which YAML 1.1 takes for 90, is a text, as in YAML 1.2."""

    def whole_number(self, node: yaml.ScalarNode) -> int | str:
        """The value of an int."""
        text = str(self.construct_scalar(node))
        if ":" in text:
            return text
        if len(text) > LONGEST_NUMBER:
            raise ValueError("a whole number is too long")
        number = int(self.construct_yaml_int(node))
        if not -(2**63) <= number < 2**64:  # keys of more bits can share one hash, which makes mappings slow
            raise ValueError("a whole number has more than 64 bits")
        return number

    def number(self, node: yaml.ScalarNode) -> float | str:
        """The value of a float."""
        text = str(self.construct_scalar(node))
        return text if ":" in text else float(self.construct_yaml_float(node))


_ValueLoader.add_constructor("tag:yaml.org,2002:int", _ValueLoader.whole_number)
_ValueLoader.add_constructor("tag:yaml.org,2002:float", _ValueLoader.number)


class _TextLoader(_ValueLoader):
    """Leaves every value as it is written: ``no``, ``007`` and ``2020-13-45`` are texts."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own type


def read_yaml(path: Path, *, fix: str = "fix the file", texts: bool = False, aliases: bool = False) -> Any:
    """The content of a YAML file; see `load_yaml`.

    Raises:
        UserError: it cannot be read, or `load_yaml` refuses it.
    """
    try:
        about = path.stat()
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):  # a named pipe waits for its writer
            raise UserError(f"{path}: is no file but a pipe or a device; give a YAML file")
        size = about.st_size
        content = path.read_bytes() if size <= LARGEST else b""
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); check the path and its rights") from None
    if size > LARGEST:
        raise UserError(f"{path}: it is larger than {LARGEST // 1000:,} kB, too large for a YAML file; check the path")
    return load_yaml(content, str(path), fix=fix, texts=texts, aliases=aliases)


def load_yaml(
    content: str | bytes, where: str, *, fix: str = "fix the file", texts: bool = False, aliases: bool = False
) -> Any:
    """The value that a YAML text states.

    Args:
        content: the text; bytes are UTF-8, with or without byte order mark.
        where: the text's place, with which a fault begins.
        fix: advice with which the sentence about invalid YAML ends.
        aliases: read up to `MOST_ALIASES` of values without aliases in them, as detectron2's own files have.
        texts: leave numbers, dates, ``yes``, ``no`` and ``null`` as the texts that they are written as.

    Raises:
        UserError: it is not valid YAML, or uses aliases (which can unfold to any size), or is nested too deeply.
    """
    loader = _TextLoader if texts else _ValueLoader
    text = content if isinstance(content, str) else ""
    depth = within = count = 0  # ``within``: the depth at which a value with an anchor begins
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content.removeprefix("\ufeff")
        for event in yaml.parse(text, Loader=loader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            count += isinstance(event, yaml.AliasEvent)
            if isinstance(event, yaml.AliasEvent) and (not aliases or within or count > MOST_ALIASES):
                alias = f"line {line} has the alias *{event.anchor}, and aliases are not read"
                raise UserError(f"{where}: {alias}; write its value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.CollectionStartEvent) and event.anchor and not within:
                within = depth
            elif depth < within:
                within = 0
            if depth > DEEPEST:
                raise UserError(f"{where}: more than {DEEPEST} lists or mappings in each other at line {line}; {fix}")
        return yaml.load(text, loader)
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{where}: it is not a UTF-8 text; save it as one") from None
    except Exception as error:  # dates and numbers that cannot be: PyYAML lets through many types
        mark = getattr(error, "problem_mark", None)
        lines = max(1, len(text.splitlines()))  # the end of a text has a mark beyond it
        place = f" at line {min(mark.line + 1, lines)}" if mark else ""
        if "escape" in (getattr(error, "problem", None) or ""):  # a path of Windows in double quotes
            fix = "write slashes in place of backslashes"
        raise UserError(f"{where}: not valid YAML{place}; {fix}") from None
