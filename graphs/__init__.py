"""Torch modules: model families, the stages that are exported to ONNX, and the eviction policies."""
