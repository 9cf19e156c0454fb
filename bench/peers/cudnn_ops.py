"""What cuDNN's graphs fuse of the layer: convolutions with what follows them, and the norm's two directions.

Tensors are NHWC; vectors over channels are fp32. Nothing here knows of modules or of autograd.
"""

import functools

import torch

from bench.peers.cudnn_plans import fastest, layout, nhwc, run
from rir_kernels.common.memory_format import empty_channels_last


def conv(x, w, spec, *, scale=None, shift=None, addends=(), relu=False):
    """relu(scale * conv(x, w) + shift + sum of mask * r): addends are pairs (r, mask), a mask of None is all ones."""
    y = empty_channels_last(spec.output_shape(x, w), x)
    return _with_epilogue(_conv, _geometry(spec), {"x": x, "w": w}, y, scale, shift, addends, relu)


def dgrad(dz, w, spec, shape, *, scale=None, addends=()):
    """The gradient of conv's x, of that shape; scale and addends as in `conv`."""
    dx = empty_channels_last(shape, dz)
    return _with_epilogue(_dgrad, (_geometry(spec), tuple(shape)), {"dz": dz, "w": w}, dx, scale, None, addends, False)


def wgrad(dz, x, spec, shape):
    """The gradient of conv's w, of that shape."""
    dw = empty_channels_last(shape, dz)
    return run(_wgrad, (_geometry(spec), tuple(shape)), {"dz": dz, "x": x}, {"y": dw})["y"]


def bn_train(z, gamma, beta, running_mean, running_var, *, momentum, eps, relu, residual=None):
    """(y, mean, invstd, mask), the running statistics updated in place; a residual is added before the ReLU.

    mask, where there is a residual, is that of the ReLU: one bit per element.
    """
    inputs = {
        "z": z, "gamma": gamma, "beta": beta, "running_mean": running_mean, "running_var": running_var,
        "eps": _scalar(eps), "momentum": _scalar(momentum), "residual": residual,
    }  # fmt: skip
    mean, invstd = torch.empty_like(gamma), torch.empty_like(gamma)
    outputs = {"y": torch.empty_like(z), "mean": mean, "invstd": invstd, "next_mean": running_mean}
    outputs["next_var"] = running_var
    mask = None
    if residual is not None:
        n, c, h, w = z.shape
        mask = torch.empty((n, c // 8, h, w), dtype=torch.uint8, device=z.device, memory_format=torch.channels_last)
        inputs["zero"], outputs["mask"] = _scalar(0.0), mask
    run(_bn_train, (relu,), inputs, outputs)
    return outputs["y"], mean, invstd, mask


def bn_backward(dy, z, gamma, beta, mean, invstd, mask, *, relu, want_residual):
    """(dz, dgamma, dbeta, dresidual); without a mask that of the ReLU is computed again, from z."""
    inputs = {"dy": dy, "z": z, "gamma": gamma, "mean": mean, "invstd": invstd, "mask": mask}
    inputs["beta"] = beta if relu and mask is None else None
    outputs = {"dz": torch.empty_like(z), "dgamma": torch.empty_like(gamma), "dbeta": torch.empty_like(gamma)}
    if want_residual:
        outputs["dresidual"] = torch.empty_like(z)
    run(_bn_backward, (relu, want_residual, z.dtype), inputs, outputs)
    return outputs["dz"], outputs["dgamma"], outputs["dbeta"], outputs.get("dresidual")


# what is in a graph: `t` holds its inputs by name, and its outputs come back by name


def _conv(g, t, geometry, relu=False):
    return {"y": _epilogue(g, t, g.conv_fprop(image=t["x"], weight=t["w"], **dict(geometry)), relu)}


def _dgrad(g, t, options, relu=False):
    geometry, shape = options
    dx = g.conv_dgrad(loss=t["dz"], filter=t["w"], **dict(geometry))
    dx.set_dim(list(shape)).set_stride(nhwc(shape))  # the stride leaves it open
    return {"y": _epilogue(g, t, dx, relu)}


def _wgrad(g, t, geometry, shape):
    dw = g.conv_wgrad(image=t["x"], loss=t["dz"], **dict(geometry))
    dw.set_dim(list(shape)).set_stride(nhwc(shape))
    return {"y": dw}


def _pointwise(g, t, relu):
    return {"y": _epilogue(g, t, t["z"], relu)}


def _epilogue(g, t, z, relu):
    if "scale" in t:
        z = g.mul(a=z, b=t["scale"])
    if "shift" in t:
        z = g.add(a=z, b=t["shift"])
    for name in [name for name in t if name.startswith("addend")]:
        mask = name.replace("addend", "mask")
        z = g.add(a=z, b=g.mul(a=t[name], b=t[mask]) if mask in t else t[name])
    return g.relu(input=z) if relu else z


def _bn_train(g, t, relu):
    y, *statistics = g.batchnorm(
        input=t["z"], scale=t["gamma"], bias=t["beta"], in_running_mean=t["running_mean"],
        in_running_var=t["running_var"], epsilon=t["eps"], momentum=t["momentum"],
    )  # fmt: skip
    outputs = dict(zip(("mean", "invstd", "next_mean", "next_var"), statistics, strict=True))
    if "residual" in t:
        y = g.add(a=y, b=t["residual"])
    outputs["y"] = g.relu(input=y) if relu else y
    if "zero" in t:
        outputs["mask"] = g.cmp_gt(input=outputs["y"], comparison=t["zero"])
    return outputs


def _bn_backward(g, t, relu, want_residual, dtype):
    dy = t["dy"]
    if "mask" in t:
        dy = g.mul(a=dy, b=t["mask"]).set_data_type(dtype)
    elif relu:
        statistics = {"mean": t["mean"], "inv_variance": t["invstd"], "scale": t["gamma"], "bias": t["beta"]}
        dy = g.relu_backward(loss=dy, input=g.batchnorm_inference(input=t["z"], **statistics)).set_data_type(dtype)
    dz, dgamma, dbeta = g.batchnorm_backward(
        grad=dy, input=t["z"], scale=t["gamma"], mean=t["mean"], inv_variance=t["invstd"]
    )
    outputs = {"dz": dz, "dgamma": dgamma, "dbeta": dbeta}
    return outputs | {"dresidual": dy} if want_residual else outputs


def _with_epilogue(define, options, inputs, y, scale, shift, addends, relu):
    """In one graph, or as the bare convolution and a pointwise graph: whichever is faster here."""
    extra = {"scale": scale, "shift": shift}
    for i, (r, mask) in enumerate(addends):
        extra |= {f"addend{i}": r, f"mask{i}": mask}
    if not (relu or any(t is not None for t in extra.values())):
        return run(define, (options,), inputs, {"y": y})["y"]

    def fused():
        run(define, (options, relu), inputs | extra, {"y": y})

    def split():
        z = run(define, (options,), inputs, {"y": torch.empty_like(y)})["y"]
        run(_pointwise, (relu,), {"z": z} | extra, {"y": y})

    fastest((define, options, relu, *map(layout, (inputs | extra).items())), (fused, split))()
    return y


def _geometry(spec):
    padding = tuple(spec.padding)
    return (
        ("pre_padding", padding), ("post_padding", padding), ("stride", tuple(spec.stride)),
        ("dilation", tuple(spec.dilation)),
    )  # fmt: skip


@functools.cache
def _scalar(value):
    return torch.tensor(value, dtype=torch.float32)
