"""The versions that are tried together, and what is tried of each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One environment. Triton is installed separately: a torch for CUDA pins one release, a CPU build none."""

    name: str
    torch: str
    triton: str
    python: str  # major.minor
    numpy: str


# each torch with the Triton it is released with; NumPy and Python take turns, so that their edges need few cells
CELLS = (
    Cell("torch-2.10", "2.10.0", "3.6.0", "3.10", "1.22.4"),
    Cell("torch-2.11", "2.11.0", "3.6.0", "3.11", "2.3.5"),
    Cell("torch-2.12", "2.12.0", "3.7.0", "3.12", "2.0.2"),
    Cell("torch-2.13", "2.13.0", "3.7.1", "3.12", "2.4.6"),
    Cell("torch-2.14", "2.14.1", "3.8.0", "3.13", "2.4.6"),
    Cell("torch-2.15", "2.15.0", "3.9.0", "3.13", "2.4.6"),
    Cell("checks", "2.13.0", "3.6.0", "3.11", "2.4.6"),  # what `make test` installs without a GPU
    Cell("triton-3.9", "2.13.0", "3.9.0", "3.11", "2.4.6"),
    Cell("python-3.10", "2.14.1", "3.8.0", "3.10", "2.2.6"),
    Cell("python-3.13", "2.10.0", "3.6.0", "3.13", "2.4.6"),
)

# two minutes on two cores together; none needs other people's networks
SUITES = {
    "launches": ("tests/kernels/test_launches.py",),  # first: one process makes them all, and takes longest
    "imports": ("tests/repository/test_imports.py", "tests/repository/test_env.py"),
    "contract": (
        "tests/functional/test_functional.py",
        "tests/modules/test_modules.py",
        "tests/modules/test_module_state.py",
    ),
    "compile": (
        "tests/pytorch/test_compile.py",
        "tests/pytorch/test_compile_fused.py",
        "tests/pytorch/test_opcheck.py",
    ),
    "surgery": (
        "tests/surgery/test_fuse.py",
        "tests/surgery/test_sequential.py",
        "tests/surgery/test_fx_traced.py",
        "tests/surgery/test_fold_bn.py",
        "tests/surgery/test_external_state.py",
    ),
    "interpreter": (
        "tests/kernels/test_interpreter.py",
        "tests/kernels/test_layer.py",
        "tests/kernels/test_batchnorm.py",
        "tests/kernels/test_plan.py",
    ),
}
GATE = ("--arch", "sm_90", "--dtype", "bf16", "--table-only")
