"""Other tools' formats (COCO exports, YOLO, labelme, Pascal VOC, CVAT) turned into LVIS format."""
