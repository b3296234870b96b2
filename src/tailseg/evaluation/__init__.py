"""Scoring: detections to run-length codes, LVIS metrics, test-time augmentation, analysis."""
