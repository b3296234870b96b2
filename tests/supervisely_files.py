"""Files of Supervisely as its own tools write them."""

import base64
import json
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from foreign_files import picture
from PIL import Image

SIZE = {"height": 40, "width": 80}


def packed(png: bytes) -> str:
    return base64.b64encode(zlib.compress(png)).decode()


def png(image: Image.Image, **more) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG", **more)
    return stream.getvalue()


def bitmap_data(pixels) -> str:
    """Pixels as the SDK writes them: a palette of which the first colour is transparent."""
    image = Image.fromarray(np.array(pixels, np.uint8))
    image.putpalette([0, 0, 0, 255, 255, 255])
    return packed(png(image, transparency=0))


def row(kind="polygon", title="cat", **more):
    value = {"id": 1, "classId": 2, "description": "", "geometryType": kind, "tags": [], "classTitle": title}
    return {**value, **more}


def polygon(exterior=((10, 10), (30, 10), (10, 30)), interior=(), title="cat", **more):
    points = {"exterior": [list(p) for p in exterior], "interior": [[list(p) for p in hole] for hole in interior]}
    return row("polygon", title, points=points, **more)


def box(first=(10, 10), last=(29, 19), title="cat", **more):
    return row("rectangle", title, points={"exterior": [list(first), list(last)], "interior": []}, **more)


def bitmap(origin=(15, 12), pixels=None, title="cat", kind="bitmap", **more):
    data = bitmap_data(np.ones((10, 20)) if pixels is None else pixels)
    return row(kind, title, bitmap={"data": data, "origin": list(origin)}, **more)


def write(path: Path, objects, **changes) -> Path:
    """An annotation file; its image is not written."""
    content = {"description": "", "tags": [], "size": SIZE, "objects": list(objects)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | changes))
    return path


def meta(root: Path, **shapes) -> Path:
    """The meta.json of a project with classes of these shapes."""
    classes = [{"title": title, "shape": shape, "color": "#0F8A12"} for title, shape in shapes.items()]
    root.mkdir(parents=True, exist_ok=True)
    (root / "meta.json").write_text(json.dumps({"classes": classes, "tags": [], "projectType": "images"}))
    return root


def supervisely(root: Path, name: str, objects, **changes) -> Path:
    """An annotation file and its image: of ``ds/a.jpg``, ``ds/ann/a.jpg.json`` and ``ds/img/a.jpg``."""
    folder, _, file = name.rpartition("/")
    picture(root / folder / "img" / file)
    write(root / folder / "ann" / f"{file}.json", objects, **changes)
    return root
