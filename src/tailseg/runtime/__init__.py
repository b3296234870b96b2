"""Exported models in use, without PyTorch: numpy, Pillow, OpenCV and onnxruntime are enough.

``tailseg.runtime.load("model.onnx").predict("photo.jpg")`` gives the objects of a picture.
"""

from tailseg.runtime.model import Found, OnnxModel, load

__all__ = ["Found", "OnnxModel", "load"]
