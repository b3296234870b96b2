"""XML files, read without entities, document types and other things that could harm."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError, TreeBuilder

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import XMLParser, iterparse

from tailseg.errors import UserError

HEAD = 4096  # bytes at a file's beginning in which its root must begin
DEPTH = 64  # levels of elements
_MULTIBYTE = ("big5", "cp9", "euc", "iso-2022", "shift")  # beginnings of names of encodings

_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
# What may stand before the root: comments, instructions, and a document type, with which reading is refused.
_FRONT = re.compile(r"<!--.*?-->|<\?.*?\?>|<!DOCTYPE[^>\[]*(?:\[.*?\]\s*)?>", re.DOTALL)
_ROOT = re.compile(r"\s*<(?:[\w.-]+:)?([A-Za-z_][\w.-]*)[\s/>]")  # without the prefix of a namespace
_ENCODING = re.compile(rb"<\?xml[^>]*?\bencoding\s*=\s*[\"']([\w.-]+)[\"']")


def head_of(path: Path) -> str:
    """The beginning of an XML file, from its root on; empty if there is none in the first 4 KB, or no file."""
    try:
        with path.open("rb") as file:
            content = file.read(HEAD)
    except OSError:
        return ""
    mark = next((mark for mark in _BOMS if content.startswith(mark)), b"")
    text = content[len(mark) :].decode(_BOMS.get(mark, "utf-8"), errors="replace")
    text = _FRONT.sub("", text)
    return text.lstrip() if _ROOT.match(text) else ""


def root_of(path: Path) -> str:
    """The name of an XML file's root; empty if there is none in the first 4 KB."""
    match = _ROOT.match(head_of(path))
    return match[1] if match else ""


def parse_xml(content: bytes, where: str) -> Element:
    """The root of an XML file without document type, whose entities could grow without end; without namespaces.

    Raises:
        UserError: it is no such file; the sentence begins with ``where``.
    """
    parser = XMLParser(target=_Shallow(where), forbid_dtd=True)
    try:
        parser.feed(_decoded(content))
        root: Element = parser.close()
    except UserError:
        raise
    except (ParseError, ValueError, LookupError) as error:
        raise _fault(error, where) from None
    for element in root.iter():
        element.tag = _local(element.tag)
    return root


class _Shallow(TreeBuilder):
    """Makes a tree of bounded depth: on a deep one each step takes the longer, the deeper it is."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where
        self._depth = 0

    def start(self, tag: str, attributes: dict[str, str]) -> Element:
        self._depth += 1
        if self._depth > DEPTH:
            raise _too_deep(self._where)
        return super().start(tag, attributes)

    def end(self, tag: str) -> Element:
        self._depth -= 1
        return super().end(tag)


def _too_deep(where: str) -> UserError:
    return UserError(f"{where}: its elements are nested in more than {DEPTH} levels; check the file")


def _decoded(content: bytes) -> bytes | str:
    """The text of a file that states an encoding which expat does not read; the bytes of any other.

    These are encodings of several bytes a sign, and UTF-16 where the file is not: C# writes that.

    Raises:
        ValueError: it is not of this encoding.
        LookupError: nobody knows it.
    """
    stated = _ENCODING.match(content)
    name = stated[1].decode().lower() if stated else ""
    if name.startswith("gb"):
        return content.decode("gb18030")  # has all signs of GB 2312 and GBK
    if name.startswith("utf-16"):  # though the declaration could be read byte by byte
        return content.decode("utf-8")
    return content.decode(name) if name.startswith(_MULTIBYTE) else content


def _local(tag: str) -> str:
    """A name without its namespace."""
    return tag.rpartition("}")[2]


def children_of_root(path: Path, root: str) -> Iterator[Element]:
    """The elements directly in the root of an XML file, one by one; each is empty as soon as the next is asked for.

    Args:
        path: of the file.
        root: the name that its root must have.

    Raises:
        UserError: it is not such a file, cannot be read, or nests its elements too deeply.
    """
    path_to_here: list[Element] = []
    try:
        for event, element in iterparse(path, events=("start", "end"), forbid_dtd=True):
            element.tag = _local(element.tag)
            if event == "start":
                path_to_here.append(element)
                if len(path_to_here) > DEPTH:
                    raise _too_deep(str(path))
                if path_to_here[0].tag != root:
                    raise UserError(f"{path}: it begins with <{element.tag}>, not <{root}>; check the file")
                continue
            path_to_here.pop()
            if len(path_to_here) == 1:
                yield element
                path_to_here[0].clear()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    except UserError:
        raise
    except (ParseError, ValueError, LookupError) as error:
        raise _fault(error, str(path)) from None


def _fault(error: Exception, where: str) -> UserError:
    if isinstance(error, DefusedXmlException):
        return UserError(f"{where}: it declares a document type; remove the line with <!DOCTYPE")
    return UserError(f"{where}: not valid XML: {error}; write it again".replace("\n", " "))
