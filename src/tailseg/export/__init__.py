"""Models for other runtimes: ONNX, PyTorch's own exported programs, OpenVINO."""
