"""Detections of one picture as people use them: indexing, masks, polygons, other tools' formats, pictures."""
