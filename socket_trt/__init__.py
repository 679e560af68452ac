"""SOCKET sparse attention for TensorRT engines: export, build, validate and run long-context models."""

__version__ = "0.1.0"
