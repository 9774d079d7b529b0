"""TensorRT: kernels of the plugins, and plans built from a bundle's stages."""
