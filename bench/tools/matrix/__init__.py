"""The package under the versions of PyTorch, Triton, Python and NumPy that it supports: `python -m bench.tools.matrix`.

`cells` says which, `pythons` finds interpreters, `run` makes one environment and judges it, `junit` reads what pytest
found, `document` is what people read.
"""
