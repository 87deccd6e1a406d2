"""Triton kernels and their launchers. No file outside this folder imports Triton, and none is imported before
an operation runs a kernel: the package works without Triton."""
