"""A case is run by an implementation, by plain PyTorch, and exactly; and the three are compared.

Budget of every result: twice PyTorch's error in the dtype, two roundings, and twice as far as the exact result itself
moves when all that goes in moves within a rounding. The last is for the small calls that are drawn here: a norm of two
or three values may enlarge a rounding a thousand times, of which PyTorch's own error shows one instance only.
"""

import dataclasses
import functools

import torch

from rir_kernels import functional, reference
from tests.support.helpers import formula, make_call, output_gradient

from .cases import Case

MOVES = 3


def use_test_settings() -> None:
    """A call that is made again has to be made as the tests make it."""
    torch.set_num_threads(1)  # as in conftest.py
    torch.backends.mkldnn.set_flags(False)
    torch.backends.cudnn.allow_tf32 = False


def repeatable(check):
    """check(case, impl, device), whose AssertionErrors end with a command that shows them again."""

    @functools.wraps(check)
    def checking(case, impl, device="cpu"):
        try:
            check(case, impl, torch.device(device))
        except Exception as error:
            again = f"python -m tests.fuzz {impl} {device} '{case.as_text()}'"
            raise AssertionError(f"{type(error).__name__}: {error}\nagain: {again}") from error

    return checking


@repeatable
def check(case: Case, impl: str, device) -> None:
    """AssertionError where `impl` is wrong or raises."""
    tensors, options = build(case)
    dtype = getattr(torch, case.dtype)
    dy = output_gradient(tensors, options, margin=_margin(tensors, options, dtype)).to(dtype)

    def exact(values):
        return call(formula, values, options, dy.double(), case.wanted)

    doubled = {name: t.double() for name, t in tensors.items()}
    golden = exact(doubled)
    generator = torch.Generator().manual_seed(case.seed)
    moved = [exact({name: _nudged(t, dtype, generator) for name, t in doubled.items()}) for _ in range(MOVES)]
    plain = call(reference.functional.conv_bn_act, tensors, options, dy, case.wanted)

    there = {name: laid_out(t.to(device), _layout(case, name)) for name, t in tensors.items()}
    its_dy = laid_out(dy.to(device), case.layouts[3], True)
    before = {name: t.clone() for name, t in there.items()}
    ours = call(functional.conv_bn_act, there, options | {"impl": impl}, its_dy, case.wanted)
    for name, tensor in there.items():
        assert torch.equal(tensor, before[name]), f"{name} was changed"
    assert torch.equal(its_dy.cpu(), dy), "the output's gradient was changed"
    assert ours.keys() == golden.keys()
    scales = _term_sizes(doubled, options, dy.double()) if case.wanted else {}
    for name, expected in golden.items():
        scale = scales.get(name, expected.abs().max() if expected.numel() else None)
        _compare(name, ours[name].cpu(), plain[name], expected, [m[name] for m in moved], dtype, scale)


def _compare(name, ours, plain, exact, moved, dtype, scale):
    assert ours.shape == exact.shape, f"{name} has the shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error, plain_error = ((found.double() - exact).abs().max() for found in (ours, plain))
    movement = torch.stack([(m - exact).abs().max() for m in moved]).max()
    budget = 2 * plain_error + 2 * torch.finfo(dtype).eps * scale + 2 * movement
    if dtype == torch.float64:  # so are the exact results: sums of up to some hundred terms of order one
        budget += 64 * torch.finfo(dtype).eps * max(1.0, float(scale))
    assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e}, PyTorch's error {plain_error:.3e}"


def _term_sizes(tensors, options, dy):
    """{name: size of the terms that a gradient adds up}, for what lies before the norm.

    A norm takes out the bias and the length of the weight: their gradients, and what they leave in the others, are sums
    that cancel, whose errors are those of their terms.
    """
    c = tensors["weight"].shape[0]
    norm = {"running_mean": tensors["x"].new_zeros(c), "running_var": tensors["x"].new_ones(c)}
    found = tensors if not options["training"] and "running_var" in tensors else tensors | norm
    # with a momentum of 1 the running variance is the batch's, over n - 1: not smaller than what was divided by
    var = call(formula, found, options | {"momentum": 1.0}, None, ())["running_var"]
    factor = (2 / (var + options["eps"])).sqrt()  # n / (n - 1) <= 2
    if "bn_weight" in tensors:
        factor = factor * tensors["bn_weight"].abs()
    dz = dy.abs() * factor[:, None, None]
    scaled = dz.sum((0, 2, 3)).max() * max(1.0, abs(options["branch_scale"]))
    return {
        "dx": scaled * tensors["weight"].abs().max(),
        "dweight": scaled * tensors["x"].abs().max(),
        "dbias": scaled,
        "dresidual0": dz.max(),
        "dresidual1": dz.max(),
    }


def build(case: Case):
    """(tensors by name, options) of the call, dense and on the CPU."""
    given = dataclasses.asdict(case)
    for name in ("dtype", "fp32_norm", "layouts", "wanted"):
        del given[name]
    dtype, norm_dtype = getattr(torch, case.dtype), torch.float32 if case.fp32_norm else None
    tensors, options = make_call(dtype=dtype, norm_dtype=norm_dtype, **given)
    for name in tensors:
        if _layout(case, name) == "one image":  # the same for all, so that a stride may be zero
            tensors[name] = tensors[name][:1].expand_as(tensors[name]).contiguous()
    return tensors, options


def call(function, tensors, options, dy, wanted) -> dict:
    """{name: tensor} of y, the running statistics after it and the gradients that are wanted; `tensors` as they lie."""
    leaves = {name: t.detach() for name, t in tensors.items() if not name.startswith("running")}
    buffers = {name: t.detach().clone() for name, t in tensors.items() if name.startswith("running")}
    for name in wanted:
        leaves[name].requires_grad_()
    residual = tuple(leaves[name] for name in ("residual0", "residual1") if name in leaves)
    rest = {name: t for name, t in leaves.items() if not name.startswith("residual")}
    with torch.set_grad_enabled(bool(wanted)):
        y = function(**rest, **buffers, residual=residual or None, **options)
    results = {"y": y.detach(), **buffers}
    if wanted:
        gradients = torch.autograd.grad(y, [leaves[name] for name in wanted], dy.to(y.dtype))
        results |= {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return results


def laid_out(tensor, layout, is_gradient=False):
    """The same values, lying otherwise."""
    if tensor.dim() != 4 or layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    n, c, h, w = tensor.shape
    if layout == "gaps":  # every other row of a wider tensor
        found = tensor.new_zeros(n, c + 1, h, 2 * w)[:, 1:, :, ::2]
    elif layout == "offset":
        found = tensor.new_zeros(n * c * h * w + 1)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    elif layout == "turned":
        found = tensor.new_zeros(w, c, n, h).permute(2, 1, 3, 0)
    elif is_gradient:  # gradients of different images are different
        return tensor
    else:
        return tensor[:1].contiguous().expand_as(tensor)
    return found.copy_(tensor)


def _layout(case, name):
    places = {"x": 0, "weight": 1, "residual0": 2, "residual1": 2}
    layout = case.layouts[places[name]] if name in places else "contiguous"
    return "contiguous" if name == "weight" and layout == "one image" else layout


def _margin(tensors, options, dtype):
    """How near to zero an input of the ReLU may not be: its error, generously."""
    inputs = {name: t.double() for name, t in tensors.items()}
    z = call(formula, inputs, options | {"activation": None}, None, ())["y"]
    return max(1e-9, 64 * torch.finfo(dtype).eps * (1 + z.abs().max().item()))


def _nudged(tensor, dtype, generator):
    """Each number times 1 + eps or 1 - eps."""
    sign = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
    return tensor * (1 + torch.finfo(dtype).eps * sign)
