"""CPU kernels, compiled by numba: one file for each family of formats."""
