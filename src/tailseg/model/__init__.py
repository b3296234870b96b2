"""The detector: backbone, neck, proposals, box stages, mask heads."""
