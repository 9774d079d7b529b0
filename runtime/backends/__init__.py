"""What runs stages: ONNX Runtime on the CPU and on CUDA, TensorRT."""
