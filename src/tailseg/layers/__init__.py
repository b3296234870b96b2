"""Layers and operators that the model is made of."""
