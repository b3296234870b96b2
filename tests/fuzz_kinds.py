"""A small sound file of every kind that we read, and what reads it: for `tests/faults`, which damages it."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from foreign_files import coco_set, picture
from PIL import Image
from supervisely_files import bitmap, box, meta, polygon, supervisely
from tiny import SMALL_RECIPE

from tailseg.checkpoint import load_model, require_fit, save_model
from tailseg.data.annotations.annotations import Category, load_annotations
from tailseg.data.images import read_image
from tailseg.data.importers.coco import read_coco
from tailseg.data.importers.cvat import read_cvat
from tailseg.data.importers.labelme import read_labelme
from tailseg.data.importers.labelstudio import read_labelstudio
from tailseg.data.importers.supervisely import read_supervisely
from tailseg.data.importers.via import read_via
from tailseg.data.importers.voc import read_voc
from tailseg.data.importers.yolo import read_yolo
from tailseg.data.sources import open_splits
from tailseg.evaluation.metrics import score
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import to_yaml
from tailseg.training.run_log import RunLog
from tailseg.zoo.detectron2 import read_detectron2
from tailseg.zoo.mmdet import read_mmdet
from tailseg.zoo.torchvision import read_torchvision

CODE = {"size": [40, 80], "counts": [805, 10, 2385]}


def coco(folder: Path) -> Path:
    path = coco_set(folder, "val.json", "images", range(3)) / "val.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["segmentation"] = CODE
    content["images"][0]["neg_category_ids"] = [17]
    path.write_text(json.dumps(content))
    return path


def results(folder: Path) -> Path:
    coco(folder)
    row = {"category_id": 17, "score": 0.5, "bbox": [20, 5, 40, 20], "segmentation": CODE}
    (folder / "found.json").write_text(json.dumps([{"image_id": i, **row} for i in (0, 2)]))
    return folder / "found.json"


def labelme(folder: Path) -> Path:
    picture(folder / "a.jpg")
    shape = {"label": "cat", "points": [[20, 10], [60, 10], [20, 30]], "shape_type": "polygon", "group_id": None}
    box = {"label": "owl", "points": [[20, 10], [60, 30]], "shape_type": "rectangle", "group_id": 1}
    content = {"version": "5", "shapes": [shape, box], "imagePath": "a.jpg", "imageHeight": 40, "imageWidth": 80}
    (folder / "a.json").write_text(json.dumps(content))
    return folder / "a.json"


def voc(folder: Path) -> Path:
    picture(folder / "a.jpg")
    box = "<xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>30</ymax>"
    size = "<size><width>80</width><height>40</height></size>"
    item = f"<object><name>cat</name><bndbox>{box}</bndbox></object>"
    (folder / "a.xml").write_text(f"<annotation><filename>a.jpg</filename>{size}{item}</annotation>")
    return folder / "a.xml"


def cvat(folder: Path) -> Path:
    picture(folder / "images" / "a.jpg")
    shapes = '<polygon label="cat" points="20,10;60,10;20,30"/>'
    shapes += '<mask label="cat" rle="3, 5" left="1" top="1" width="4" height="2"/>'
    image = f'<image id="0" name="a.jpg" width="80" height="40">{shapes}</image>'
    (folder / "annotations.xml").write_text(f"<annotations><version>1.1</version>{image}</annotations>")
    return folder / "annotations.xml"


def labelstudio(folder: Path) -> Path:
    picture(folder / "a.jpg")
    size = {"original_width": 80, "original_height": 40}
    values = [
        {"points": [[25, 25], [75, 25], [25, 75]], "polygonlabels": ["cat"]},
        {"x": 25, "y": 25, "width": 50, "height": 50, "rotation": 10, "rectanglelabels": ["owl"]},
        {"x": 50, "y": 50, "radiusX": 20, "radiusY": 30, "rotation": 0, "ellipselabels": ["owl"]},
        # 12,800 values in runs of up to 65,536: 1,600 transparent ones, then opaque ones.
        {"format": "rle", "rle": [0, 0, 50, 0, 57, 28, 127, 6, 63, 0, 229, 119, 255, 224], "brushlabels": ["cat"]},
    ]
    result = [{"id": str(i), "type": "x", "value": value, **size} for i, value in enumerate(values)]
    annotations = [{"completed_by": 1, "result": result, "was_cancelled": False, "updated_at": "2024-01-01"}]
    content = [{"id": 1, "annotations": annotations, "data": {"image": "/data/upload/1/1234abcd-a.jpg"}}]
    (folder / "export.json").write_text(json.dumps(content))
    return folder / "export.json"


def via(folder: Path) -> Path:
    picture(folder / "a.jpg")
    shapes = [
        {"name": "polygon", "all_points_x": [20, 60, 20], "all_points_y": [10, 10, 30]},
        {"name": "ellipse", "cx": 40, "cy": 20, "rx": 10, "ry": 5, "theta": 0.5},
    ]
    regions = [{"shape_attributes": shape, "region_attributes": {"class": "1", "side": ""}} for shape in shapes]
    attributes = {"class": {"type": "dropdown", "options": {"1": "cat"}}}
    images = {"a.jpg34": {"filename": "a.jpg", "size": 34, "regions": regions, "file_attributes": {}}}
    content = {"_via_settings": {}, "_via_img_metadata": images, "_via_attributes": {"region": attributes}}
    (folder / "via.json").write_text(json.dumps(content))
    return folder / "via.json"


def supervisely_annotations(folder: Path) -> Path:
    hole = ((12, 12), (15, 12), (12, 15))
    rows = [polygon(interior=[hole]), box(title="owl"), bitmap(title="owl", instance="k")]
    supervisely(meta(folder, cat="polygon", owl="any"), "ds/a.jpg", rows)
    return folder / "ds" / "ann" / "a.jpg.json"


def supervisely_meta(folder: Path) -> Path:
    path = supervisely_annotations(folder)
    path.write_text(path.read_text().replace("geometryType", "kind"))
    return folder / "meta.json"


def yolo_labels(folder: Path) -> Path:
    picture(folder / "images" / "a.jpg")
    (folder / "labels").mkdir()
    (folder / "data.yaml").write_text("train: images\nnames: [cat, owl]\n")
    (folder / "labels" / "a.txt").write_text("0 0.25 0.25 0.75 0.25 0.25 0.75\n1 0.5 0.5 0.25 0.25\n")
    return folder / "labels" / "a.txt"


def yolo_config(folder: Path) -> Path:
    yolo_labels(folder)
    text = "path: .\ntrain: [images]\nval: images\nnc: 2\nnames:\n  0: cat\n  1: owl\n"
    (folder / "data.yaml").write_text(text)
    return folder / "data.yaml"


def data_yaml(folder: Path) -> Path:
    coco(folder)
    (folder / "set.yaml").write_text("train: val.json\nval: val.json\nimages: images\n")
    return folder / "set.yaml"


def recipe(folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(to_yaml(resolve("demo/seesaw")))
    return folder / "recipe.yaml"


def image(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"a{suffix}")
        return folder / f"a{suffix}"

    return make


def packed(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """The file of another kind, packed."""

    def make_packed(folder: Path) -> Path:
        path = make(folder)
        target = path.with_name(path.name + ".gz")
        target.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        return target

    return make_packed


def labelme_with_pixels(folder: Path) -> Path:
    path = labelme(folder)
    content = json.loads(path.read_text())
    Image.new("L", (10, 6), 255).save(folder / "mask.png")
    mask = base64.b64encode((folder / "mask.png").read_bytes()).decode()
    (folder / "mask.png").unlink()
    shape = {"label": "cat", "points": [[5, 5], [14, 10]], "shape_type": "mask", "mask": mask}
    content["shapes"].append(shape)
    content["imageData"] = base64.b64encode((folder / "a.jpg").read_bytes()).decode()
    (folder / "a.jpg").unlink()
    path.write_text(json.dumps(content))
    return path


def setting(folder: Path) -> Path:
    """The text of a --set."""
    (folder / "set.txt").write_text("model.rpn={nms_iou: 0.6, pre_nms_test: 500}")
    return folder / "set.txt"


def use_setting(path: Path) -> None:
    resolve("demo/seesaw", [path.read_bytes().decode(errors="surrogateescape")])


def log(folder: Path) -> Path:
    (folder / "metrics.jsonl").write_text(
        '{"step": 6, "loss": 1.5}\n{"step": 6, "epoch": 1, "metrics": {"segm": {"AP": 0.5, "APr": null}}}\n'
    )
    return folder / "metrics.jsonl"


def use_log(path: Path) -> None:
    log = RunLog(path, writes=True)
    log.metrics_at(6)
    log.cut(6)


def model(folder: Path) -> Path:
    small = resolve("demo/seesaw", SMALL_RECIPE)
    state = {key: torch.zeros_like(value) for key, value in build_detector(small, 2).state_dict().items()}
    categories = (Category(3, "cat", "r", 1, 2), Category(5, "owl", "f", 200, 300))
    save_model(folder / "model.safetensors", state, small, categories, step=7)
    return folder / "model.safetensors"


def use_model(path: Path) -> None:
    """As `tailseg predict` does, but for the values of the weights."""
    found = load_model(path)
    with torch.device("meta"):
        detector = build_detector(found.recipe, len(found.categories))
    require_fit(detector.state_dict(), found.state, path)


def foreign_state() -> dict[str, Any]:
    return {"backbone.conv1.weight": torch.arange(24.0).view(2, 3, 2, 2), "roi_head.x": torch.ones(3).half()}


def torch_file(*, zipped: bool) -> Callable[[Path], Path]:
    """A checkpoint of mmdetection, but for most of its tensors."""

    def make(folder: Path) -> Path:
        meta = {"mmdet_version": "2.18.0", "CLASSES": ("cat", "owl"), "config": MMDET_CONFIG, "epoch": np.float32(3)}
        path = folder / "a.pth"
        torch.save({"meta": meta, "state_dict": foreign_state()}, path, _use_new_zipfile_serialization=zipped)
        return path

    return make


MMDET_CONFIG = (
    "model = dict(type='MaskRCNN', backbone=dict(type='ResNet', depth=50, frozen_stages=1, norm_eval=True), "
    "rpn_head=dict(anchor_generator=dict(scales=[8])), test_cfg=dict(rcnn=dict(score_thr=0.05, max_per_img=100)))\n"
    "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)\n"
)


def mmdet_config(folder: Path) -> Path:
    (folder / "config.py").write_text(MMDET_CONFIG)
    return folder / "config.py"


def use_mmdet_config(path: Path) -> None:
    text = path.read_bytes().decode(errors="replace")
    checkpoint = path.with_name("a.pth")
    torch.save({"meta": {"cfg": text}, "state_dict": foreign_state()}, checkpoint)
    read_mmdet(checkpoint)


def model_zoo_pickle(folder: Path) -> Path:
    content = {
        "model": {k: v.float().numpy() for k, v in foreign_state().items()},
        "__author__": "Detectron2 Model Zoo",
    }
    (folder / "a.pkl").write_bytes(pickle.dumps(content, 4))
    return folder / "a.pkl"


def detectron2_config(folder: Path) -> Path:
    model_zoo_pickle(folder)
    weights = [10.0, 10.0, 5.0, 5.0]
    content = {
        "INPUT": {"FORMAT": "BGR", "MIN_SIZE_TRAIN": [640, 800], "MAX_SIZE_TEST": 1333},
        "MODEL": {
            "PIXEL_MEAN": [103.53, 116.28, 123.675],
            "ROI_BOX_HEAD": {"BBOX_REG_WEIGHTS": weights, "POOLER_TYPE": "ROIAlignV2"},
            "ROI_BOX_CASCADE_HEAD": {"BBOX_REG_WEIGHTS": [weights]},
            "RPN": {"NMS_THRESH": 0.7, "SMOOTH_L1_BETA": 0.0},
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "annotations": (coco, lambda path: load_annotations(path, path.parent)),
    "annotations with errors": (coco, lambda path: load_annotations(path, path.parent, tolerant=True)),
    "COCO import": (coco, read_coco),
    "results": (results, lambda path: score(path.parent / "val.json", path)),
    "labelme": (labelme, lambda path: read_labelme(path.parent)),
    "VOC": (voc, lambda path: read_voc(path.parent)),
    "CVAT": (cvat, read_cvat),
    "Label Studio": (labelstudio, read_labelstudio),
    "VIA": (via, read_via),
    "Supervisely": (supervisely_annotations, lambda path: read_supervisely(path.parents[2])),
    "Supervisely's meta.json": (supervisely_meta, lambda path: read_supervisely(path.parent)),
    "YOLO labels": (yolo_labels, lambda path: read_yolo(path.parents[1])),
    "YOLO data.yaml": (yolo_config, read_yolo),
    "data YAML": (data_yaml, open_splits),
    "recipe": (recipe, lambda path: resolve(str(path))),
    "--set": (setting, use_setting),
    "packed annotations": (packed(coco), lambda path: load_annotations(path, path.parent)),
    "packed results": (packed(results), lambda path: score(path.parent / "val.json", path)),
    "labelme with pixels": (labelme_with_pixels, lambda path: read_labelme(path.parent)),
    "log": (log, use_log),
    "model": (model, use_model),
    "recipe of a model": (model, lambda path: resolve(str(path))),
    "mmdetection": (torch_file(zipped=True), read_mmdet),
    "mmdetection, legacy": (torch_file(zipped=False), read_mmdet),
    "mmdetection's config": (mmdet_config, use_mmdet_config),
    "torchvision": (torch_file(zipped=True), lambda path: read_torchvision(str(path))),
    "detectron2": (model_zoo_pickle, read_detectron2),
    "detectron2's config": (detectron2_config, lambda path: read_detectron2(path.with_name("a.pkl"))),
    **{f"image {suffix}": (image(suffix), read_image) for suffix in (".jpg", ".png", ".tif", ".gif", ".webp", ".bmp")},
}
