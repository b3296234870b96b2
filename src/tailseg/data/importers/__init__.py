"""Other tools' formats (COCO exports, YOLO, labelme, Pascal VOC, CVAT, Label Studio, Supervisely, VIA) turned into LVIS format."""
