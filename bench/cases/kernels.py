"""Each kernel of the fused layer alone: both convolutions, both gradients, and the four passes of the norm.

"triton" and "hybrid" are the launchers that the layer itself calls; "merged" is the same result in ATen's operators,
"compile" those through torch.compile. Inputs are what the kernel meets in a RiR layer of that shape.
"""

from types import SimpleNamespace

import torch

from bench import peers
from bench.cases import expressions
from bench.cases.case import Case, Variant, random_input
from bench.cases.modules import latest
from bench.cases.selection import Selection
from bench.measure.gate import verdict
from bench.measure.launches import launches
from bench.measure.roofline import kernel_passes
from bench.schema import DTYPES
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.equivalence.criterion import judge
from rir_kernels.triton.shapes import Shape

COMMON = ("merged", "compile", "triton")
WITH_VENDOR = (*COMMON, "hybrid")
# op: (mode, implementations)
OPS = {
    "conv_eval": ("eval", WITH_VENDOR),
    "conv_train": ("train_fwd", WITH_VENDOR),
    "finalize": ("train_fwd", COMMON),
    "normalize": ("train_fwd", COMMON),
    "reduce": ("bwd", COMMON),
    "apply": ("bwd", COMMON),
    "data_grad": ("bwd", ("merged", "triton", "hybrid")),
    "weight_grad": ("bwd", ("merged", "triton", "hybrid")),
}
MARGIN = 1e-2  # the ReLU's inputs that are nearer to zero get no gradient: rounding would decide whether they have one
SUM_ROUNDINGS = 16  # of a sum over all pixels, at the scale of its terms


def cases(selection: Selection) -> list[Case]:
    shapes = selection.chosen_shapes(quick=("16@32",) if selection.on_cpu else ("96@32", "384@8", "16@32"))
    return [
        _case(op, shape, dtype)
        for dtype in selection.chosen_dtypes()
        for shape in shapes
        for op in selection.chosen_ops(OPS)
    ]


def _case(op, shape, dtype):
    mode, impls = OPS[op]
    torch_dtype = getattr(torch, DTYPES[dtype])
    passes = kernel_passes(shape, torch_dtype.itemsize).get(op)
    return Case(
        suite="kernels", op=op, shape=shape.name, batch=shape.batch, dtype=dtype, modes={mode != "eval": (mode,)},
        impls=impls, passes={mode: [passes]} if passes else {},
        set_up=lambda device: set_up(op, shape, torch_dtype, device),
    )  # fmt: skip


def set_up(op: str, shape: Shape, dtype: torch.dtype, device: torch.device):
    """build(impl, training) of one kernel's variants; the shape's inputs are shared by the cases that follow it."""
    tensors = _inputs(shape, dtype, device)
    expression = getattr(expressions, op)
    golden = SimpleNamespace(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in vars(tensors).items()})
    given, exact, scales = expression(tensors), expression(golden), expressions.sum_scales(golden)

    def build(impl, _training):
        call, results = _call(impl, op, expression, tensors)
        config = {}

        def check():
            with launches() as seen:
                returned = call()
            found = results(returned)
            if seen:
                config["launches"] = seen
            return verdict([_judge(name, found[name], value, given[name], scales) for name, value in exact.items()])

        return Variant({OPS[op][0]: call}, check, config)

    return build


def _judge(name, found, golden, given, scales):
    # eager's sums are as good as their order, which is a lucky one: ours and the compiler's are other orders
    is_sum = name in scales
    scale = (scales[name] if is_sum else golden.abs().max()).item()
    return judge(("output", name), found, golden, [given], scale, SUM_ROUNDINGS if is_sum else 2)


def _call(impl, op, expression, tensors):
    """(what is timed, its return value -> results by name)"""
    if impl == "merged":
        return lambda: expression(tensors), lambda found: found
    if impl == "compile":
        chosen = peers.compiled.options(impl, training=True)
        compiled = torch.compile(expression, fullgraph=True, dynamic=False, options=chosen)
        return lambda: compiled(tensors), lambda found: found
    return _launcher(impl, op, tensors)


def _launcher(impl, op, t):
    from rir_kernels.backends import cudnn
    from rir_kernels.triton.launch import batchnorm, conv, wgrad

    convolution = cudnn if impl == "hybrid" else conv
    gradient = cudnn if impl == "hybrid" else wgrad
    spec = t.spec
    affine = {"gamma": t.gamma, "beta": t.beta}
    layer = {"bias": None, "residuals": (), "spec": spec}
    norm = {"mean": t.mean, "invstd": t.invstd, **affine, "spec": spec}
    statistics = batchnorm.Statistics(t.mean, t.var, t.invstd)
    moments = batchnorm.TileMoments(t.tile_mean, t.tile_m2, t.count)
    count = t.z.numel() // t.z.shape[1]

    def moments_of(found):
        z, moments = found
        merged = batchnorm.bn_finalize(moments, spec.eps)
        return {"z": z, "mean": merged.mean, "invstd": merged.invstd}

    return {
        "conv_eval": (
            lambda: convolution.conv_infer(t.x, t.weight, **layer, mean=t.mean, var=t.var, **affine, save_z=False),
            lambda found: {"y": found[0]},
        ),
        "conv_train": (lambda: convolution.conv_train(t.x, t.weight, **layer), moments_of),
        "finalize": (lambda: batchnorm.bn_finalize(moments, spec.eps), vars),
        "normalize": (
            lambda: batchnorm.bn_apply(t.z, statistics, **affine, residuals=(), spec=spec),
            lambda y: {"y": y},
        ),
        "reduce": (lambda: batchnorm.bn_reduce(t.dy, t.z, None, **norm), lambda sums: {"sums": torch.stack(sums)}),
        "apply": (
            lambda: batchnorm.bn_apply_grad(t.dy, t.z, None, t.sums, count=count, **norm),
            lambda found: {"dz": found[0]},
        ),
        "data_grad": (
            lambda: convolution.conv_data_grad(t.dz, t.weight, shape=t.x.shape, spec=spec),
            lambda found: {"dx": found[0]},
        ),
        "weight_grad": (
            lambda: gradient.conv_weight_grad(t.dz, t.x, kernel=tuple(t.weight.shape[2:]), spec=spec),
            lambda dweight: {"dweight": dweight},
        ),
    }[op]


@latest
def _inputs(shape, dtype, device):
    """What the kernels of a RiR layer of that shape are handed, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).to(device)

    identity = min(shape.c_in, shape.c_out) // 2
    spec = ConvBNActSpec((shape.stride,) * 2, (shape.kernel // 2,) * 2, shortcut_channels=identity)
    x = random_input(shape.batch, shape.c_in, shape.size, dtype, device)
    fan_in = shape.c_in * shape.kernel**2
    weight = normal(shape.c_out, shape.c_in, shape.kernel, shape.kernel, scale=(2 / fan_in) ** 0.5).to(dtype)
    t = SimpleNamespace(spec=spec, x=x, weight=weight.contiguous(memory_format=torch.channels_last))
    t.gamma, t.beta = 1 + normal(shape.c_out, scale=0.1), normal(shape.c_out, scale=0.1)
    vars(t).update(expressions.conv_train(t))
    t.var = t.invstd**-2 - spec.eps
    t.dz = torch.randn_like(t.z)
    away = expressions.preactivation(t).abs() > MARGIN
    t.dy = torch.randn_like(t.z) * away
    t.sums = expressions.reduce(t)["sums"]
    rows = t.z.numel() // shape.c_out
    tiles = -(-rows // 128)
    t.tile_mean, t.tile_m2 = normal(tiles, shape.c_out), 128 * normal(tiles, shape.c_out) ** 2
    t.count = torch.full((tiles,), 128.0, device=device)
    t.count[-1] = rows - 128 * (tiles - 1)
    return t
