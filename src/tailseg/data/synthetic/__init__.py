"""The built-in long-tailed data set, drawn on first use."""
