"""Is every kernel of the convolution exact? Inputs out of {-1, 0, 1} make every sum exact, whatever its order.

So results are compared bit by bit: with fp32 convolutions of torch, whose values are integers too (rounded to them, as
cuDNN's Winograd transforms leave the integers), rounded to the dtype. Each is repeated, and every repetition must give
the same bits.
"""

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.shapes import Shape

# the smallest first; 16@32 is folded, where Triton leaves out a fence between threads and the tensor cores' reads
SHAPES = (
    Shape(64, 64, 8),
    Shape(96, 96, 32),
    Shape(192, 192, 16),
    Shape(384, 384, 8),
    Shape(16, 16, 32),
    Shape(512, 512, 7),
    Shape(96, 192, 32, stride=2),
    Shape(48, 96, 32, kernel=1, stride=2),
    Shape(3, 96, 32),
    Shape(384, 10, 8, kernel=1),
    Shape(96, 96, 32, batch=250),
)
DENSITY = 0.3  # of what is not zero: results stay below 256, which bf16 still counts to
# sums of fp32 values in an order of our own, merged over a few hundred tiles: 100 roundings, where a lost tile is 1e-3
STATISTICS = 1e-5


def run(journal, machine, _seconds):
    for shape in machine.some(SHAPES):
        sized = machine.sized(shape)
        operands = None
        for op, check in OPS.items():
            name = f"{shape.name} x{shape.batch} {op}"
            if name in journal.items:
                continue
            operands = operands or _operands(sized, machine)
            journal.take(name, lambda check=check, operands=operands: _judge(check(**operands), machine))
            _synchronize()


def _operands(shape, machine):
    generator = torch.Generator().manual_seed(0)

    def integers(*size):
        signs = torch.randint(0, 2, size, generator=generator, dtype=torch.int8) * 2 - 1
        kept = torch.rand(size, generator=generator) < DENSITY
        return (signs * kept).to(machine.device, machine.dtype)

    shortcut = min(shape.c_in, shape.c_out) // 2
    spec = ConvBNActSpec((shape.stride,) * 2, (shape.kernel // 2,) * 2, shortcut_channels=shortcut)
    x = _channels_last(integers(shape.batch, shape.c_in, shape.size, shape.size))
    weight = _channels_last(integers(shape.c_out, shape.c_in, shape.kernel, shape.kernel))
    dz = _channels_last(integers(*spec.output_shape(x, weight)))
    vectors = {
        "mean": integers(shape.c_out).float(),
        "gamma": 1 - 2 * integers(shape.c_out).float().abs(),
        "beta": integers(shape.c_out).float(),
    }
    return {"x": x, "weight": weight, "dz": dz, "spec": spec, "vectors": vectors}


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def _judge(found, machine):
    """found: (call, golden, close), as the checks below return it."""
    from rir_kernels.triton.launch.runtime import observed

    call, golden, close = found
    _poison(machine)
    with observed(_announce):
        first = call()
    expected = golden(first)
    wrong = [name for name, exact in expected.items() if not torch.equal(first[name], exact.to(first[name].dtype))]
    wrong += [f"{name} ({far})" for name, far in close(first).items() if far]
    details = {name: _difference(first[name], expected[name]) for name in wrong if name in expected}
    if wrong:
        return {"status": "failed", "error": f"not exact: {', '.join(wrong)}", "details": details}
    for repeat in range(machine.repeats):
        again = call()
        if different := [name for name in first if not torch.equal(first[name], again[name])]:
            return {"status": "failed", "error": f"repetition {repeat + 1} has other bits: {', '.join(different)}"}
    return {"repeats": machine.repeats}


def _announce(kernel, _programs, _options):
    """Waits for the kernel that was launched, and names it: the next one that is launched is where a hang begins."""
    _synchronize()
    print(f"       {kernel.__name__}", flush=True)


def _difference(found, exact):
    """How many values are wrong, and where the first and the last of them are."""
    wrong = (found.float() != exact.to(found.dtype).float()).nonzero()
    return {"wrong": len(wrong), "of": found.numel(), "first": wrong[0].tolist(), "last": wrong[-1].tolist()}


def _poison(machine):
    """Memory that the next allocations are likely to get holds NaN: what a kernel leaves out shows."""
    torch.full((2**20 if machine.dry else 2**30,), float("nan"), dtype=machine.dtype, device=machine.device)


def _synchronize():
    torch.cuda.synchronize()


def _convolved(x, weight, spec):
    z = F.conv2d(x.float(), weight.float(), stride=spec.stride, padding=spec.padding).round()
    z[:, : spec.shortcut_channels] += spec.shortcut(x).float()
    return z


def _nothing(_):
    return {}


def _training(x, weight, spec, **_):
    from rir_kernels.triton.launch import batchnorm, conv

    def call():
        z, moments = conv.conv_train(x, weight, bias=None, residuals=(), spec=spec)
        merged = batchnorm.bn_finalize(moments, spec.eps)
        return {"z": z, "mean": merged.mean, "var": merged.var}

    def close(found):
        var, mean = torch.var_mean(_convolved(x, weight, spec).double(), (0, 2, 3), correction=0)
        far = {"mean": (found["mean"] - mean).abs() / (var + spec.eps).sqrt(), "var": (found["var"] / var - 1).abs()}
        return {
            name: f"off by {error.max():.1e}" if not error.max() <= STATISTICS else "" for name, error in far.items()
        }

    return call, lambda _: {"z": _convolved(x, weight, spec)}, close


def _inference(x, weight, spec, vectors, **_):
    from rir_kernels.triton.launch import conv

    exact = ConvBNActSpec(spec.stride, spec.padding, shortcut_channels=spec.shortcut_channels, eps=0.0)
    var = torch.ones_like(vectors["mean"])

    def call():
        y, _ = conv.conv_infer(x, weight, bias=None, residuals=(), spec=exact, var=var, save_z=False, **vectors)
        return {"y": y}

    def golden(_):
        mean, gamma, beta = (vectors[name][:, None, None] for name in ("mean", "gamma", "beta"))
        return {"y": F.relu(gamma * (_convolved(x, weight, spec) - mean) + beta)}

    return call, golden, _nothing


def _data_gradient(x, weight, dz, spec, **_):
    from rir_kernels.triton.launch import conv

    def call():
        return {"dx": conv.conv_data_grad(dz, weight, shape=tuple(x.shape), spec=spec)[0]}

    def golden(_):
        dx = conv2d_input(x.shape, weight.float(), dz.float(), stride=spec.stride, padding=spec.padding).round()
        spec.shortcut(dx).add_(dz[:, : spec.shortcut_channels].float())
        return {"dx": dx}

    return call, golden, _nothing


def _data_gradient_with_sums(x, weight, dz, spec, **_):
    """x is the z of the layer upstream here."""
    from rir_kernels.triton.launch import batchnorm, conv

    mean = dz.new_ones(x.shape[1], dtype=torch.float32)
    gamma, beta, invstd = -mean, 0.5 * mean, 2 * mean
    upstream = batchnorm.Upstream(x, mean, invstd, gamma, beta, relu=True)

    def call():
        dx, partial = conv.conv_data_grad(dz, weight, shape=tuple(x.shape), spec=spec, upstream=upstream)
        sums = () if partial is None else batchnorm.bn_sum(partial, 1.0)  # there are none at strides of two
        return {"dx": dx} | dict(zip(("sum dy", "sum dy * xhat"), sums, strict=False))

    def golden(found):
        exact = _data_gradient(x, weight, dz, spec)[1](None)
        if "sum dy" in found:
            xhat = (x.double() - 1) * 2
            dy = exact["dx"].double() * (0.5 - xhat > 0)
            exact |= {"sum dy": dy.sum((0, 2, 3)), "sum dy * xhat": (dy * xhat).sum((0, 2, 3))}
        return exact

    return call, golden, _nothing


def _weight_gradient(x, weight, dz, spec, **_):
    from rir_kernels.triton.launch import wgrad

    def call():
        return {"dweight": wgrad.conv_weight_grad(dz, x, kernel=tuple(weight.shape[2:]), spec=spec)}

    def golden(_):
        exact = conv2d_weight(x.float(), weight.shape, dz.float(), stride=spec.stride, padding=spec.padding)
        return {"dweight": exact.round()}

    return call, golden, _nothing


OPS = {
    "forward, training": _training,
    "forward, inference": _inference,
    "data gradient": _data_gradient,
    "data gradient, sums": _data_gradient_with_sums,
    "weight gradient": _weight_gradient,
}
