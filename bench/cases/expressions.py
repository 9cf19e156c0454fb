"""The kernels' results in ATen's operators: what eager PyTorch would run, and, in float64, the golden.

Each takes the namespace that `cases.kernels` makes and returns its results by name. Norms are computed in fp32.
"""

import torch
import torch.nn.functional as F


def conv_eval(t) -> dict:
    y = F.batch_norm(_conv(t), t.mean, t.var, t.gamma, t.beta, False, 0.0, t.spec.eps)
    return {"y": F.relu_(y)}


def conv_train(t) -> dict:
    z = _conv(t)
    if z.is_cuda and not torch.compiler.is_compiling() and z.dtype != torch.float64:
        mean, invstd = torch.batch_norm_stats(z, t.spec.eps)  # what eager batch norm itself runs
    else:
        var, mean = torch.var_mean(_wide(z), (0, 2, 3), correction=0)
        invstd = torch.rsqrt(var + t.spec.eps)
    return {"z": z, "mean": mean, "invstd": invstd}


def finalize(t) -> dict:
    count = t.count[:, None]
    total = count.sum()
    mean = (t.tile_mean * count).sum(0) / total
    var = (t.tile_m2.sum(0) + (count * (t.tile_mean - mean) ** 2).sum(0)) / total
    return {"mean": mean, "var": var, "invstd": torch.rsqrt(var + t.spec.eps)}


def normalize(t) -> dict:
    return {"y": F.relu_(F.batch_norm(t.z, t.mean, t.var, t.gamma, t.beta, False, 0.0, t.spec.eps))}


def reduce(t) -> dict:
    masked, xhat = _masked(t)
    return {"sums": torch.stack([masked.sum((0, 2, 3)), (masked * xhat).sum((0, 2, 3))])}


def apply(t) -> dict:
    masked, xhat = _masked(t)
    means = t.sums[:, None, :, None, None] / (t.z.numel() / t.z.shape[1])
    return {"dz": (_channel(t.gamma * t.invstd) * (masked - means[0] - xhat * means[1])).to(t.z.dtype)}


def data_grad(t) -> dict:
    spec = t.spec
    dx = torch.nn.grad.conv2d_input(t.x.shape, t.weight, t.dz, spec.stride, spec.padding)
    spec.shortcut(dx).add_(t.dz[:, : spec.shortcut_channels])
    return {"dx": dx}


def weight_grad(t) -> dict:
    return {"dweight": torch.nn.grad.conv2d_weight(t.x, t.weight.shape, t.dz, t.spec.stride, t.spec.padding)}


def sum_scales(t) -> dict:
    """What the rounding of results that are sums over all pixels is relative to: the size of their terms."""
    masked, xhat = _masked(t)
    terms = torch.stack([masked.abs().sum((0, 2, 3)), (masked * xhat).abs().sum((0, 2, 3))])
    std = 1 / t.invstd
    return {"sums": terms.max(), "mean": std.max(), "var": std.max() ** 2, "invstd": t.invstd.max()}


def preactivation(t) -> torch.Tensor:
    """What the ReLU sees."""
    return (_wide(t.z) - _channel(t.mean)) * _channel(t.invstd * t.gamma) + _channel(t.beta)


def _conv(t):
    z = F.conv2d(t.x, t.weight, None, t.spec.stride, t.spec.padding)
    z[:, : t.spec.shortcut_channels] += t.spec.shortcut(t.x)
    return z


def _masked(t):
    return _wide(t.dy) * (preactivation(t) > 0), (_wide(t.z) - _channel(t.mean)) * _channel(t.invstd)


def _channel(values):
    return values[:, None, None]


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))
