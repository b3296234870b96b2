"""From files on disk to batches: data set, augmentation, sampling, loading."""
