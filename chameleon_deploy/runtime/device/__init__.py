"""The runtime on NVIDIA GPUs: CUDA memory, graphs bound to it, and TensorRT engines."""
