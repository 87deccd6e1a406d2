"""Triton kernels and their launchers. No file outside this folder imports Triton, and those that do are only
imported once an operation runs a kernel: the package works without Triton."""
