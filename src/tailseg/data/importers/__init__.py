"""Other tools' formats (COCO exports, YOLO, labelme, Pascal VOC, CVAT, VIA) turned into LVIS format."""
