"""Networks built from rir_kernels, run from a checkout; the wheel does not hold them.

models.create("rir18_wide")                 by name; `python -m models` lists them and their costs
models.RiR(inner_shortcut=..., ...)         with every option
models.from_pytorchcv, models.to_pytorchcv  weights of pytorchcv's rir_cifar10, both ways
"""

from .pytorchcv import from_pytorchcv, to_pytorchcv
from .rir import RiR
from .zoo import create, list_models

__all__ = ["RiR", "create", "from_pytorchcv", "list_models", "to_pytorchcv"]
