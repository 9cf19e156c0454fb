"""env_report: the environment, for a bug report. `python -m rir_kernels` prints it."""

import importlib
import platform

import torch

from .common import switches
from .common.arguments import IMPLS
from .common.spec import ConvBNActSpec
from .common.versions import untested
from .dispatch import choose


class EnvReport(dict):
    """Name -> value, both JSON-serializable; str() is a table."""

    def __str__(self) -> str:
        lines = list(_flat(self))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines)


def env_report() -> EnvReport:
    """Reports versions, devices, switches, and which implementations run here (otherwise what they lack).

    "tested" lists the versions outside those that the package is tested with (`versions.TESTED`), or is "yes".

    Starts CUDA only if it is available. Never raises: what cannot be determined is reported as such.
    """
    cuda = torch.cuda.is_available()
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
    }
    return EnvReport(
        rir_kernels=importlib.import_module(__package__).__version__,
        **versions,
        tested=f"no: {', '.join(outside)}" if (outside := untested(versions)) else "yes",
        platform=platform.platform(),
        cuda=torch.version.cuda or "no (a build of torch without it)",
        cudnn=torch.backends.cudnn.version() if cuda else "not loaded",
        devices=[_describe(index) for index in range(torch.cuda.device_count())] if cuda else ["cpu"],
        interpreter=switches.interpreting(),
        tf32=switches.tf32_allowed(),
        impls={impl: _availability(impl, "cuda" if cuda else "cpu") for impl in IMPLS if impl != "auto"},
    )


def _version(name) -> str:
    try:
        return importlib.import_module(name).__version__
    except Exception as error:  # a broken install raises more than ImportError
        return f"no ({type(error).__name__}: {error})"


def _describe(index) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}"


def _availability(impl, device) -> str:
    x = torch.empty(1, 1, 1, 1, device=device)
    try:  # resolved as for a call
        choose.resolve(impl, x, x, ConvBNActSpec())
    except (ImportError, RuntimeError) as error:
        return f"no: {error}"
    return "yes"


def _flat(report):
    for name, value in report.items():
        if isinstance(value, dict):
            reasons: dict[str, str] = {}
            for key, item in value.items():
                # one implementation often lacks what another does: the reason differs only in its name
                first = reasons.setdefault(item.replace(f'"{key}"', ""), key)
                yield f"{name}.{key}", item if item == "yes" or first == key else f"no: as {first}"
        elif isinstance(value, list):
            yield from ((f"{name}[{index}]", item) for index, item in enumerate(value))
        else:
            yield name, ("off", "on")[value] if isinstance(value, bool) else value
