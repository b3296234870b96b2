"""Formats of other tools (COCO exports, YOLO, those of labelling tools) turned into LVIS format."""
