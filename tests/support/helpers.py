"""Oracles that tests share: the operation's formula, one call with every result, and the budget for errors."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels import reference
from rir_kernels.common.streams import pack_weight


@contextlib.contextmanager
def in_fp64():
    """fp64 by default, and a fixed seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def double_precision():
    """`in_fp64` in every test of the file that imports it."""
    with in_fp64():
        yield


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def conv_formula(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """Convolution tap by tap: every tap is one matrix product over the channels of a group."""
    (sh, sw), (ph, pw), (dh, dw) = pair(stride), pair(padding), pair(dilation)
    _, _, kh, kw = weight.shape
    padded = F.pad(x, (pw, pw, ph, ph)).unflatten(1, (groups, -1))
    rows = (padded.shape[3] - dh * (kh - 1) - 1) // sh + 1
    columns = (padded.shape[4] - dw * (kw - 1) - 1) // sw + 1
    weight = weight.unflatten(0, (groups, -1))
    y = 0
    for i in range(kh):
        for j in range(kw):
            tap = padded[..., i * dh :: sh, j * dw :: sw][..., :rows, :columns]
            y = y + torch.einsum("goc,ngchw->ngohw", weight[..., i, j], tap)
    y = y.flatten(1, 2)
    return y if bias is None else y + bias[:, None, None]


def formula(
    x, weight, bn_weight=None, bn_bias=None, running_mean=None, running_var=None, *, bias=None, residual=None,
    residual_at="pre_norm", branch_scale=1.0, stride=1, padding=0, dilation=1, groups=1, training=False, momentum=0.1,
    eps=1e-5, activation="relu",
):  # fmt: skip
    """conv_bn_act from sums and products alone; the running statistics are updated in place, as by the original."""
    residuals = () if residual is None else residual if isinstance(residual, tuple) else (residual,)

    def joined(y):
        y = y * branch_scale
        for r in residuals:
            y = torch.cat([y[:, : r.shape[1]] + r, y[:, r.shape[1] :]], dim=1)
        return y

    z = conv_formula(x, weight, bias, stride, padding, dilation, groups)
    z = joined(z) if residual_at == "pre_norm" else z
    mean, var = running_mean, running_var
    if training:
        count = z.numel() // z.shape[1]
        mean = z.sum((0, 2, 3)) / count
        var = ((z - mean[:, None, None]) ** 2).sum((0, 2, 3)) / count
        if running_mean is not None:
            with torch.no_grad():
                running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
                running_var.copy_((1 - momentum) * running_var + momentum * var * count / (count - 1))
    y = (z - mean[:, None, None]) / (var[:, None, None] + eps).sqrt()
    y = y if bn_weight is None else y * bn_weight[:, None, None]
    y = y if bn_bias is None else y + bn_bias[:, None, None]
    y = joined(y) if residual_at == "post_norm" else y
    return y.clamp(min=0) if activation == "relu" else y


def norm_formula(x, *args, **options):
    """norm_act: the convolution with the identity, each of whose sums has one term."""
    return formula(x, torch.eye(x.shape[1], dtype=x.dtype)[:, :, None, None].to(x.device), *args, **options)


def make_norm_call(channels=8, **case):
    """`make_call` for norm_act, whose default differs in where the residual joins."""
    tensors, options = make_call(channels=(channels, channels), kernel=1, **{"residual_at": "post_norm", **case})
    del tensors["weight"]
    return tensors, options


def make_call(
    *, channels=(4, 6), batch=3, size=(7, 6), kernel=3, residuals=(), bias=False, affine="both", statistics=True,
    dtype=torch.float64, norm_dtype=None, seed=0, **options,
):  # fmt: skip
    """(tensors by name, options) of one call of conv_bn_act, with random numbers that are exact in the dtype.

    residuals: the numbers of channels of residual0 and residual1. affine: "both", "weight", "bias" or "none".
    """
    generator = torch.Generator().manual_seed(seed)
    norm_dtype = norm_dtype or dtype
    c_in, c_out = channels
    kernel = pair(kernel)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    c_group = c_in // options.get("groups", 1)
    # weights of the size that training starts with keep outputs of order one
    weight = (normal(c_out, c_group, *kernel).double() / (c_group * kernel[0] * kernel[1]) ** 0.5).to(dtype)
    tensors = {"x": normal(batch, c_in, *size), "weight": weight}
    if affine in ("both", "weight"):
        tensors["bn_weight"] = normal(c_out, dtype=norm_dtype)
    if affine in ("both", "bias"):
        tensors["bn_bias"] = normal(c_out, dtype=norm_dtype)
    if statistics:
        tensors["running_mean"] = normal(c_out, dtype=norm_dtype)
        tensors["running_var"] = normal(c_out, dtype=norm_dtype).abs() + 0.5
    if bias:
        tensors["bias"] = normal(c_out)
    if residuals or options.get("branch_scale", 1.0) != 1.0:
        options.setdefault("residual_at", "pre_norm")
    geometry = [pair(options.get(name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    out = [
        (s + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for s, k, stride, padding, dilation in zip(size, kernel, *geometry, strict=True)
    ]
    tensors |= {f"residual{i}": normal(batch, c, *out) for i, c in enumerate(residuals)}
    return tensors, options


def run(function, tensors, options, dy=None, dtype=None):
    """{name: tensor}: y, the running statistics, and the gradient "d<name>" of every other tensor of the call.

    The tensors are copied, and cast to `dtype` if one is given. dy: gradient of y; None leaves the gradients out.
    """
    copies = {name: t.detach().to(dtype or t.dtype, copy=True) for name, t in tensors.items()}
    buffers = {name: t for name, t in copies.items() if name.startswith("running")}
    leaves = {name: t.requires_grad_(dy is not None) for name, t in copies.items() if name not in buffers}
    residual = tuple(t for name, t in leaves.items() if name.startswith("residual"))
    rest = {name: t for name, t in leaves.items() if not name.startswith("residual")}
    y = function(**rest, **buffers, residual=residual or None, **options)
    results = {"y": y.detach(), **buffers}
    if dy is not None:
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y))
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return results


def output_gradient(tensors, options, margin=0.05, seed=9, function=formula):
    """A gradient of y (fp64, few enough bits for every dtype), zero where the ReLU hangs on rounding errors.

    An input of the ReLU that is nearer to zero than its error may fall on either side of it: gradients would then
    differ by as much as they are large. `margin` must exceed that error.
    """
    before = run(function, tensors, options | {"activation": None}, dtype=torch.float64)["y"]
    dy = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()
    return dy * (before.abs() > margin)


def assert_within_budget(ours, torchs, golden, dtype):
    """Each result: error <= 2 * (torch's error in this dtype) + 2 * eps * max|golden|.

    Twice torch's, since two correct programs round differently; the rest is one rounding of inputs and one of outputs,
    for results in which torch happens to be exact.
    """
    eps = torch.finfo(dtype).eps
    for name, exact in golden.items():
        ours_error, torchs_error = ((results[name].double() - exact).abs() for results in (ours, torchs))
        # the bias of a convolution before batch statistics has the gradient zero: what is there is the rounding error
        # of a sum like that of the norm's own bias
        scale = golden["dbn_bias"] if name == "dbias" else exact
        budget = 2 * torchs_error.max() + 2 * eps * scale.abs().max()
        assert ours[name].shape == exact.shape, name
        assert ours_error.max() <= budget, (  # NaN fails it
            f"{name}: error {ours_error.max():.3e} at {worst(ours_error)}, rms "
            f"{ours_error.square().mean().sqrt():.3e}; torch's {torchs_error.max():.3e}, budget {budget:.3e}"
        )


def worst(error):
    """The index of the largest element."""
    return tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))


# modules


def scrambled(module):
    """Norms whose numbers are not ones and zeros, so that none can be forgotten or swapped."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2.0)
    return module


def module_results(module, x, *more):
    """y, every gradient of a random loss, and every buffer, by name; the reference's under the packed layer's names."""
    module = copy.deepcopy(module)
    leaves = [t.clone().requires_grad_() for t in (x, *more)]
    y = module(*leaves)
    torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).mul(y).sum().backward()
    named = {name: p.grad for name, p in module.named_parameters()} | dict(module.named_buffers())
    for name, layer in module.named_modules():
        if isinstance(layer, reference.RiRLayer):
            _pack_names(named, f"{name}." if name else "")
    return {"y": y.detach()} | {f"input{i}": leaf.grad for i, leaf in enumerate(leaves)} | named


def _pack_names(named, prefix):
    blocks = [named.pop(f"{prefix}conv_{name}.weight", None) for name in ("rr", "rt", "tr", "tt")]
    named[f"{prefix}weight"] = pack_weight(*blocks)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        halves = [named.pop(f"{prefix}bn_{stream}.{name}", None) for stream in "rt"]
        halves = [half for half in halves if half is not None]
        named[f"{prefix}bn.{name}"] = halves[0] if name == "num_batches_tracked" else torch.cat(halves)


def assert_same_results(module, ref, *inputs, rtol, atol):
    ours, theirs = module_results(module, *inputs), module_results(ref, *inputs)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
