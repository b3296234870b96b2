"""A trained model in use: sources of pictures, large ones in slices, videos, and the files that are written."""

from tailseg.predict.exported import is_exported
from tailseg.predict.model import Model, load

__all__ = ["Model", "is_exported", "load"]
