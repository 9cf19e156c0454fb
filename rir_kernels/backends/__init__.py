"""Who computes: ATen, our kernels, the vendor's convolution between them, a recorded plan."""
