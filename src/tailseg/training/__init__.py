"""Training: the loop and everything that only a run needs."""
