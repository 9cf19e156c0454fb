"""Backends: ATen, our kernels, the vendor's convolution with our norm kernels, recorded plans."""
