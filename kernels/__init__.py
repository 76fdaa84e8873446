"""Triton kernels, imported as `vamoh.kernels` (never as `kernels`)."""
