"""Networks built from rir_kernels, run from a checkout; the wheel does not hold them."""
