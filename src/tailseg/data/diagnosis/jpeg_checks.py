"""JPEG files whose compressed data end before the image does, though the file ends as it should.

Decoders fill up what is missing (baseline: grey; progressive: less detail) and say nothing through Pillow. But bytes
put in before the mark of the end change the pixels only if the decoder had run out of data: else they are skipped. So
no sound image is accused. Not found are faults that a later restart mark, or a later scan of a progressive file,
makes up for.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tailseg.data.images import open_content

END = b"\xff\xd9"
_GREY = 128  # of all channels, in which baseline decoders leave the last block if there is no data for it
_MORE = bytes(1 + 37 * i % 251 for i in range(256))  # none of them begins a mark


def data_run_out(path: Path, decoded: Image.Image) -> bool:
    """Return whether a JPEG's data end before its last pixels.

    Args:
        path: of the file.
        decoded: its pixels, as Pillow decodes them.
    """
    if decoded.format != "JPEG" or decoded.mode not in ("L", "RGB"):
        return False
    last = decoded.getpixel((decoded.width - 1, decoded.height - 1))
    if "progressive" not in decoded.info and last not in (_GREY, (_GREY,) * 3):
        return False
    content = path.read_bytes()
    end = content.rfind(END)
    try:
        with open_content(content[:end] + _MORE + content[end:], "JPEG") as image:
            return image.tobytes() != decoded.tobytes()
    except Exception as error:  # Pillow's decoders raise many types; the file itself was decoded before
        if isinstance(error, MemoryError):
            raise
        return False
