"""The Triton kernels themselves: against fp64 where they can run, and as compiled for a GPU that need not be here."""

from dataclasses import asdict

import torch

import rir_kernels as rir
from rir_kernels.common import versions
from rir_kernels.dispatch import choose
from rir_kernels.triton import inspect
from rir_kernels.triton.shapes import SHAPE_TABLE

ARCH = "sm_90"
SEED = 0  # one for which no ReLU of the small layers hangs on a rounding error
CONV_KERNELS = ("_conv_fwd_kernel", "_conv_bwd_weight_kernel")

# (in_channels, out_channels, options of RiRLayer, image): a plain layer, a stage transition, and sizes that fit no tile
SMALL = ((8, 8, {}, (8, 8)), (8, 12, {"stride": 2}, (9, 8)), (7, 11, {"residual_fraction": 0.4}, (7, 6)))
LARGE = ((96, 96, {}, (32, 32)), (96, 192, {"stride": 2}, (32, 32)), (95, 131, {"residual_fraction": 0.4}, (17, 15)))


def obstacle(device: torch.device) -> str:
    """Why the kernels cannot run or be compiled here, or an empty string."""
    if missing := versions.triton_missing():
        return missing
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability() < choose.CAPABILITY_NEEDED):
        capability = ".".join(map(str, choose.CAPABILITY_NEEDED))
        return f"an NVIDIA GPU of compute capability {capability} or later, found {torch.cuda.get_device_name()}"
    return ""


def cases(device: torch.device):
    """(dtype, layer) of each check: small and few for the interpreter, larger on a GPU."""
    on_gpu = device.type == "cuda"
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if on_gpu else (torch.float32, torch.float16)
    return [(dtype, layer) for dtype in dtypes for layer in (LARGE if on_gpu else SMALL)]


def check(dtype: torch.dtype, layer: tuple, device: torch.device) -> list[dict]:
    """One RiRLayer with impl="triton" beside its four naive convolutions, in train and in eval mode."""
    c_in, c_out, options, image = layer
    generator = torch.Generator().manual_seed(SEED)
    ours = rir.RiRLayer(c_in, c_out, **options, impl="triton", device=device, dtype=dtype)
    with torch.no_grad():  # the norm's numbers as training could have left them: none of them 0 or 1
        ours.weight.copy_(torch.randn(ours.weight.shape, generator=generator) * ours.weight[0].numel() ** -0.5)
        for tensor in (ours.bn.weight, ours.bn.bias, ours.bn.running_mean):
            tensor.copy_(torch.randn(c_out, generator=generator))
        ours.bn.running_var.copy_(torch.rand(c_out, generator=generator) + 0.5)
    batch = 16 if device.type == "cuda" else 2
    x = torch.randn(batch, c_in, *image, generator=generator).to(device, dtype, memory_format=torch.channels_last)
    naive = ours.to_reference()
    title = f"{c_in} to {c_out}{' /2' if ours.stride == 2 else ''}, {image[0]}x{image[1]}"
    reports = (rir.compare(naive, ours, x, train=train) for train in (True, False))
    return [{"title": title, "dtype": str(dtype).removeprefix("torch."), **report.to_dict()} for report in reports]


def compile_table() -> list[dict]:
    """Every kernel of the eleven layers of the shape table, compiled for sm_90 in bf16: what ptxas and the IR say."""
    rows = inspect.run(SHAPE_TABLE, ["bf16"], ARCH)
    return [asdict(row) | {"passed": row.passed} for row in rows]
