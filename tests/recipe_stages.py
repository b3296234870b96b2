"""Stages of a cascade, as a file writes them and as recipes hold them."""

THREE_STAGES = """
extends: demo/seesaw
model:
  box_head: {class_agnostic: true}
  stages:
  - {}
  - {iou: 0.6, stds: [0.05, 0.05, 0.1, 0.1], weight: 0.5}
  - {iou: 0.7, weight: 0.25, mask_weight: 0}
"""


def plain_stage(**changes: object) -> dict[str, object]:
    return {"iou": 0.5, "stds": [0.1, 0.1, 0.2, 0.2], "tsd": False, "weight": 1.0, "mask_weight": 1.0} | changes


CASCADE = [
    plain_stage(mask_weight=0.0),
    plain_stage(iou=0.6, stds=[0.05, 0.05, 0.1, 0.1], weight=0.5, mask_weight=0.0),
    plain_stage(iou=0.7, stds=[0.033, 0.033, 0.067, 0.067], weight=0.25),
]
