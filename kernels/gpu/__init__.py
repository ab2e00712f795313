"""Triton kernels: one file for each family of formats, all built on `product`."""
