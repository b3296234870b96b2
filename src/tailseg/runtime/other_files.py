"""Whether an ONNX file has weights in other files, told before anything of it is loaded.

onnxruntime opens whatever path a tensor's ``external_data`` names. The file is a protocol buffer: fields with numbers,
types and lengths, in any order. Every message that can hold a tensor is walked; all else is stepped over by its length.
"""

from __future__ import annotations

MOST_FIELDS = 2_000_000  # of all messages that are walked: some 100 times as many as a large model has
_VARINT, _EIGHT_BYTES, _MESSAGE, _FOUR_BYTES = 0, 1, 2, 5  # types of fields
_DATA_LOCATION, _EXTERNAL_DATA = 14, 13  # fields of a tensor
# Message -> number of its field -> message in it.
_HOLDERS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}


def has_weights_elsewhere(content: bytes) -> bool:
    """Return whether a tensor of an ONNX file, in whatever graph or function of it, says that it lies elsewhere.

    Raises:
        ValueError: it is no ONNX file, or has more than `MOST_FIELDS` fields.
    """
    waiting, fields = [("model", 0, len(content))], 0
    while waiting:
        message, place, end = waiting.pop()
        while place < end:
            fields += 1
            if fields > MOST_FIELDS:
                raise ValueError(f"more than {MOST_FIELDS:,} fields")
            tag, place = _number(content, place, end)
            field, kind, value = tag >> 3, tag & 7, 0
            if kind in (_VARINT, _MESSAGE):
                value, place = _number(content, place, end)
            if kind not in (_VARINT, _MESSAGE, _EIGHT_BYTES, _FOUR_BYTES) or not 0 < field < 1 << 29:
                raise ValueError("a field of no known type")
            begin, place = place, place + {_VARINT: 0, _MESSAGE: value, _EIGHT_BYTES: 8, _FOUR_BYTES: 4}[kind]
            if place > end:
                raise ValueError("a field is cut off")
            if message == "tensor" and (field == _EXTERNAL_DATA or (field == _DATA_LOCATION and (kind or value))):
                return True
            if kind == _MESSAGE and field in _HOLDERS[message]:
                waiting.append((_HOLDERS[message][field], begin, place))
    return False


def _number(content: bytes, place: int, end: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and the place behind it."""
    number = 0
    for shift in range(0, 70, 7):
        if place >= end:
            break
        byte = content[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise ValueError("a number is cut off or has too many bytes")
