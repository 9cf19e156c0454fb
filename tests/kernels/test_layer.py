"""The whole fused operation through `functional`: outputs, every gradient and the running statistics.

Golden: the reference in fp64 on the same rounded inputs. Budget: twice the error that the reference itself makes in
the same dtype, plus two roundings of the largest value.
"""

import pytest
import torch

import rir_kernels as rir
from rir_kernels import functional, reference

from .targets import TARGETS, ieee_fp32, rand  # noqa: F401 (an autouse fixture)

targets = pytest.mark.parametrize("target", TARGETS)
impls = pytest.mark.parametrize("impl", ["triton", "hybrid"])

# channels (in, out), stride, kernel, residual channels, options of the call
CASES = {
    "P1 conv, BN, ReLU": ((8, 16), 1, 3, (), {}),
    "P2 conv, BN": ((8, 16), 2, 1, (), {"activation": None}),
    "P3 residual after the norm": ((16, 16), 1, 3, (16,), {"residual_at": "post_norm"}),
    "P4 residual before the norm": ((16, 16), 1, 3, (8,), {}),
    "P4 stride 2, two residuals": ((8, 24), 2, 3, (12, 24), {}),
    "P6 scaled branch": ((8, 8), 1, 3, (8,), {"residual_at": "post_norm", "branch_scale": 0.3}),
    "scaled before the norm, bias": ((8, 8), 1, 3, (4,), {"branch_scale": 0.3, "bias": True}),
    "odd channels": ((5, 9), 2, 3, (7,), {}),
    "no affine": ((8, 8), 1, 3, (), {"affine": False}),
}


def _call(case, target, training):
    (c_in, c_out), stride, k, residuals, options = case
    device = target[0]
    n, h, w = 3, 7, 6
    out = (-(-h // stride), -(-w // stride))
    stats = (device, torch.float32)
    bias, affine = options.get("bias", False), options.get("affine", True)
    tensors = {
        "x": rand((n, c_in, h, w), target, seed=1),
        "weight": rand((c_out, c_in, k, k), target, seed=2, scale=(c_in * k * k) ** -0.5),
        "bias": rand((c_out,), target, seed=3) if bias else None,
        "bn_weight": rand((c_out,), stats, seed=4) if affine else None,
        "bn_bias": rand((c_out,), stats, seed=5) if affine else None,
    }
    tensors |= {f"residual{i}": rand((n, c, *out), target, seed=6 + i) for i, c in enumerate(residuals)}
    buffers = rand((c_out,), stats, seed=9), rand((c_out,), stats, seed=10).abs() + 0.5
    options = {name: value for name, value in options.items() if name not in ("bias", "affine")}
    return tensors, buffers, {"stride": stride, "padding": k // 2, "training": training, **options}


def _run(function, tensors, buffers, options, dtype=None, keep=lambda y: y.double().abs() > 0.02):
    """{name: tensor} of output, gradients and statistics."""
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).clone(memory_format=torch.preserve_format)
        for name, t in tensors.items()
    }
    for leaf in leaves.values():
        if leaf is not None:
            leaf.requires_grad_()
    mean, var = (b.to(dtype or b.dtype).clone() for b in buffers)
    residual = tuple(leaves[name] for name in leaves if name.startswith("residual"))
    y = function(
        leaves["x"], leaves["weight"], leaves["bn_weight"], leaves["bn_bias"], mean, var,
        bias=leaves["bias"], residual=residual or None, **options,
    )  # fmt: skip
    # a gradient from outside; zero where the ReLU's mask hangs on the last bit
    dy = rand(tuple(y.shape), (y.device, tensors["x"].dtype), seed=20).to(y.dtype)
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(y, list(present.values()), dy * keep(y))
    return {"y": y, "running_mean": mean, "running_var": var} | {
        f"d{name}": grad for name, grad in zip(present, grads, strict=True)
    }


def _check(ours, plain, golden, dtype):
    eps = torch.finfo(dtype).eps
    for name, exact in golden.items():
        error = (ours[name].double() - exact).abs().max()
        budget = 2 * (plain[name].double() - exact).abs().max() + 2 * eps * exact.abs().max()
        # a bias before batch statistics has no gradient but rounding noise, in which zero is the best answer
        budget = budget + 1e-6 * (name == "dbias")
        assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@targets
@impls
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_within_the_budget(case, target, impl, training, poisoned):
    tensors, buffers, options = _call(case, target, training)
    golden = _run(reference.conv_bn_act, tensors, buffers, options, torch.float64)
    # one mask of borderline elements for all three: the golden's
    sure = golden["y"].abs() > 0.02

    def keep(_y):
        return sure

    golden = _run(reference.conv_bn_act, tensors, buffers, options, torch.float64, keep)
    plain = _run(reference.conv_bn_act, tensors, buffers, options, None, keep)
    before = [None if t is None else t.clone() for t in tensors.values()]
    ours = _run(
        lambda *args, **kw: functional.conv_bn_act(*args, **kw, impl=impl), tensors, buffers, options, None, keep
    )
    _check(ours, plain, golden, target[1])
    for tensor, copy in zip(tensors.values(), before, strict=True):
        assert tensor is None or torch.equal(tensor, copy)


@impls
@targets
def test_same_bits_in_both_memory_formats_and_output_in_the_inputs(impl, target):
    tensors, buffers, options = _call(CASES["P4 residual before the norm"], target, True)
    last = _run(lambda *a, **k: functional.conv_bn_act(*a, **k, impl=impl), tensors, buffers, options)
    first = {name: None if t is None else t.contiguous() for name, t in tensors.items()}
    first = _run(lambda *a, **k: functional.conv_bn_act(*a, **k, impl=impl), first, buffers, options)
    assert last["y"].is_contiguous(memory_format=torch.channels_last)
    assert first["y"].is_contiguous()
    if impl == "triton":  # the vendor may choose another algorithm for another format
        for name in last:
            assert torch.equal(first[name], last[name]), name


@targets
def test_bit_identical_from_run_to_run(target):
    tensors, buffers, options = _call(CASES["P4 stride 2, two residuals"], target, True)
    runs = 3 if target[0].type == "cpu" else 250
    first = _run(lambda *a, **k: functional.conv_bn_act(*a, **k, impl="triton"), tensors, buffers, options)
    for _ in range(runs):
        again = _run(lambda *a, **k: functional.conv_bn_act(*a, **k, impl="triton"), tensors, buffers, options)
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name]), name


@targets
@impls
def test_only_what_is_asked_for(target, impl, monkeypatch):
    """Frozen tensors get None, and the kernels behind their gradients do not run."""
    from rir_kernels import vendor
    from rir_kernels.triton.launch import conv, wgrad

    def forbidden(*_args, **_kwargs):
        raise AssertionError("computed a gradient that nobody asked for")

    tensors, buffers, options = _call(CASES["P1 conv, BN, ReLU"], target, True)
    for module in (conv, vendor):
        monkeypatch.setattr(module, "conv_data_grad", forbidden)
    weight = tensors["weight"].requires_grad_()
    y = functional.conv_bn_act(
        tensors["x"], weight, tensors["bn_weight"], tensors["bn_bias"], *buffers, impl=impl, **options
    )
    y.sum().backward()
    assert weight.grad is not None and tensors["x"].grad is None
    for module in (wgrad, vendor):
        monkeypatch.setattr(module, "conv_weight_grad", forbidden)
    scale = tensors["bn_weight"].requires_grad_()
    y = functional.conv_bn_act(tensors["x"], weight.detach(), scale, tensors["bn_bias"], *buffers, impl=impl, **options)
    y.sum().backward()
    assert scale.grad is not None


@impls
@targets
def test_second_derivatives_are_refused(target, impl):
    tensors, buffers, options = _call(CASES["P1 conv, BN, ReLU"], target, True)
    x = tensors["x"].requires_grad_()
    y = functional.conv_bn_act(x, tensors["weight"], None, None, *buffers, impl=impl, **options)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        (y.sum() + grad.pow(2).sum()).backward()  # a gradient penalty


@impls
@targets
def test_inputs_changed_before_backward_are_noticed(target, impl):
    tensors, buffers, options = _call(CASES["P1 conv, BN, ReLU"], target, True)
    weight = tensors["weight"].requires_grad_()
    x = tensors["x"].clone()
    y = functional.conv_bn_act(x, weight, None, None, *buffers, impl=impl, **options)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "options", [{"groups": 2}, {"dilation": 2}, {"kernel": 7}, {"stride": 3}], ids=lambda o: next(iter(o))
)
def test_what_the_kernels_do_not_do_is_refused_by_name_and_done_by_hybrid(options, device):
    options = dict(options)
    k = options.pop("kernel", 3)
    groups = options.get("groups", 1)
    target = device, torch.float32
    x, weight = rand((2, 8, 9, 9), target, seed=1), rand((8, 8 // groups, k, k), target, seed=2)
    kwargs = {"padding": k // 2, "training": True, **options}
    with pytest.raises(NotImplementedError, match="has no kernel for"):
        functional.conv_bn_act(x, weight, impl="triton", **kwargs)
    y = functional.conv_bn_act(x, weight, impl="hybrid", **kwargs)
    golden = reference.conv_bn_act(x.double(), weight.double(), **kwargs)
    plain = reference.conv_bn_act(x, weight, **kwargs)
    budget = 2 * (plain.double() - golden).abs().max() + 2 * 1.2e-7 * golden.abs().max()
    assert (y.double() - golden).abs().max() <= budget


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("stride", [1, 2])
@targets
@impls
def test_rir_layer_against_its_four_convolutions(target, impl, stride, shortcut):
    """The identity inside the kernels, forward and backward; `compare` brings the budget."""
    device, dtype = target
    torch.manual_seed(0)
    layer = rir.RiRLayer(8, 12, stride=stride, shortcut=shortcut, impl=impl, device=device, dtype=dtype)
    report = rir.compare(layer.to_reference(), layer, rand((3, 8, 6, 5), target, seed=1))
    assert report.passed, report


@targets
def test_inference_with_a_gradient_normalizes_the_z_that_it_saves(target):
    """Backward takes the ReLU's mask from the stored z: y must be its function, not the accumulator's.

    With mean 0, variance + eps 1 and no affine parameters y is relu(z) exactly; from the accumulator it would be
    rounded from other digits wherever scale and rounding do not commute, so the branch is scaled by 3.
    """
    from rir_kernels.spec import ConvBNActSpec
    from rir_kernels.triton.launch import conv

    x, weight = rand((2, 8, 6, 6), target, seed=1), rand((8, 8, 3, 3), target, seed=2)
    residual = rand((2, 8, 6, 6), target, seed=3)
    statistics = {"mean": torch.zeros(8, device=target[0]), "var": torch.full((8,), 0.5, device=target[0])}
    spec = ConvBNActSpec(padding=(1, 1), eps=0.5, post_norm=True, branch_scale=3.0)
    y, z = conv.conv_infer(
        x, weight, bias=None, residuals=[residual], spec=spec, gamma=None, beta=None, save_z=True, **statistics
    )
    golden = (z.double() * 3 + residual.double()).relu()
    # one rounding to the dtype, and the fp32 roundings of product and sum
    allowed = torch.finfo(target[1]).eps / 2 * golden + 1.2e-7 * (3 * z.double().abs() + residual.double().abs())
    assert ((y.double() - golden).abs() <= allowed).all()
