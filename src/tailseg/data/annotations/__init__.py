"""One reader of LVIS and COCO annotation files: checked numpy columns, mapped from a cache."""
