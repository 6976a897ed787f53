"""Tensor operations: plain-torch definitions and their Triton kernels."""
