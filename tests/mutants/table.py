"""The faults, each with the tests of that part alone which must notice it."""

from .calls import CALLS
from .compiled import COMPILED_PATH
from .convolution import CONVOLUTION
from .norms import NORMS
from .surgery import SURGERY_FAULTS
from .weight_gradient import WEIGHT_GRADIENT

MUTANTS = [*CONVOLUTION, *NORMS, *WEIGHT_GRADIENT, *CALLS, *SURGERY_FAULTS, *COMPILED_PATH]
