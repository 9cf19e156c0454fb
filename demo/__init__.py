"""The first look at rir_kernels: `make demo`, or `python -m demo --out out`.

A network is fused, proved equal to the original, trained beside it, and reported on in one HTML page. It needs neither
a GPU nor data: without them it takes scikit-learn's digits, and the kernels run in Triton's interpreter.
"""
