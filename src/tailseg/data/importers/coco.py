"""COCO's instance files, also LVIS's and Roboflow's."""

from __future__ import annotations

from pathlib import Path

from tailseg.data.annotations.annotations import Annotations, require_same_categories
from tailseg.data.annotations.image_files import ImageFolder, candidate_names
from tailseg.data.importers.foreign import Source, read_object
from tailseg.data.importers.split import read_part
from tailseg.data.importers.writer import Part, Row
from tailseg.errors import UserError


def read_coco(source: Path) -> Source:
    """COCO's instance files (also LVIS's, and Roboflow's `_annotations.coco.json`), with masks."""
    read: dict[str, tuple[Annotations, list[Row], Part]] = {}
    for split, path in _coco_files(source).items():
        read[split] = read_part(path, _coco_images(path, source if source.is_dir() else source.parent, split))
    train = read["train"][0]
    if "val" in read:
        require_same_categories(train, read["val"][0])
    parts = {split: part for split, (_, _, part) in read.items()}
    if "val" in parts:
        _separate(parts)
    return Source(read["train"][1], parts)


SPLIT_FOLDERS = {"train": ("train", "training", "train2017"), "val": ("val", "valid", "validation", "val2017")}


def _separate(parts: dict[str, Part]) -> None:
    """Keep apart images of the two splits that have the same name but are not the same file."""
    train = dict(zip((row["file_name"] for row in parts["train"].images), parts["train"].files, strict=True))
    pairs = zip(parts["val"].images, parts["val"].files, strict=True)
    if any(train.get(row["file_name"], path).resolve() != path.resolve() for row, path in pairs):
        for split, part in parts.items():
            part.images = [{**row, "file_name": f"{split}/{row['file_name']}"} for row in part.images]


def _coco_files(source: Path) -> dict[str, Path]:
    """The annotation file of each split."""
    if source.is_file():
        return {"train": source}
    other = ("caption", "keypoint", "panoptic", "stuff", "image_info", "test")
    patterns = ("*.json", "annotations/*.json", "*/_annotations.coco.json")
    files = [path for pattern in patterns for path in sorted(source.glob(pattern))]
    files = [path for path in files if not any(word in str(path.relative_to(source)) for word in other)]
    found: dict[str, list[Path]] = {
        split: [path for path in files if split in str(path.relative_to(source)).lower()] for split in ("train", "val")
    }
    if not found["train"] and len(files) == 1:
        return {"train": files[0]}
    for split, paths in found.items():
        if len(paths) > 1:
            names = f"{paths[0].relative_to(source)} and {paths[1].relative_to(source)}"
            raise UserError(f"{source}: {names} both look like the {split} split; give one file instead of the folder")
    if not found["train"]:
        raise UserError(f"{source}: no annotation file with 'train' in its name; give the file instead of the folder")
    return {split: paths[0] for split, paths in found.items() if paths}


def _coco_images(path: Path, root: Path, split: str) -> Path:
    """The folder that holds the images of an annotation file: all of them, or else at least the first.

    The split's own folders come first, since both splits may have files of the same name.
    """
    images = read_object(path).get("images")
    if not isinstance(images, list) or not images or not all(isinstance(row, dict) for row in images):
        raise UserError(f"{path}: 'images' must be a list of at least one image; check the file")
    names = [candidate_names(_text(row.get("file_name")), _text(row.get("coco_url"))) for row in images]
    bases = (root, root / "images")
    folders = [base / name for base in bases for name in SPLIT_FOLDERS[split]]
    folders = [
        folder for folder in (*folders, path.parent, path.parent / "images", *reversed(bases)) if folder.is_dir()
    ]
    for wanted in (names, names[:1]):
        for folder in folders:
            listing = ImageFolder(folder)
            if all(listing.find(candidates, f"{path}: an image") for candidates in wanted):
                return folder
    shown = names[0][0] if names[0] else "without a name"
    raise UserError(f"{path}: its first image, {shown}, is not in {root} or its images folder; put the images there")


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
