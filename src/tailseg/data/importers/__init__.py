"""Other tools' formats (COCO exports, YOLO, labelme, Pascal VOC) turned into LVIS format."""
