"""Data sets and detections written in other tools' formats: COCO, YOLO, Pascal VOC, labelme, CVAT."""
