"""The operation without its convolution, by the norm kernels: numbers, launches, the ops, and its place in a chain."""

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rir_kernels as rir
from rir_kernels import reference
from rir_kernels.autograd import backward_fusion, registered_op
from rir_kernels.backends import fused, plans
from rir_kernels.common import tracing
from rir_kernels.common.memory_format import is_channels_last
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.dispatch import bn_state, plan_cache
from rir_kernels.functional import norm_act
from rir_kernels.triton.launch import runtime
from rir_kernels.triton.plan.plan import Plan
from tests.support.helpers import assert_within_budget, make_norm_call, norm_formula, output_gradient, run

from .targets import TARGETS, ieee_fp32, rand, small_integers  # noqa: F401 (an autouse fixture)

targets = pytest.mark.parametrize("target", TARGETS)
# fp32 in the interpreter, bf16 on a GPU: enough for what does not depend on the dtype
one_target = pytest.mark.parametrize("target", [TARGETS[0], TARGETS[2]])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
ours = functools.partial(norm_act, impl="triton")

CASES = {
    "P5 BN, ReLU": {"channels": 16},
    "no activation, odd channels": {"channels": 5, "activation": None},
    "residuals after the norm": {"channels": 8, "residuals": (8, 3)},
    "scaled": {"channels": 8, "residuals": (8,), "branch_scale": 0.3},
    "residuals before the norm, scaled": {
        "channels": 8, "residuals": (8, 3), "residual_at": "pre_norm", "branch_scale": 0.5,
    },
    "no affine, no statistics": {"channels": 8, "affine": "none", "statistics": False, "training": True},
    "one pixel": {"channels": 24, "size": (1, 1), "batch": 5},
}  # fmt: skip


def _torchs(x, *args, **options):
    return reference.conv_bn_act(x, None, *args, **options)


def _call(case, target, training=True):
    device, dtype = target
    tensors, options = make_norm_call(**{"training": training, **case}, dtype=dtype, norm_dtype=torch.float32)
    dy = output_gradient(tensors, options, function=norm_formula)
    last = torch.channels_last
    tensors = {name: t.to(device, memory_format=last) if t.dim() == 4 else t.to(device) for name, t in tensors.items()}
    return tensors, options, dy


@targets
@modes
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_within_the_budget(case, target, training, poisoned):
    tensors, options, dy = _call(case, target, training)
    golden = run(norm_formula, tensors, options, dy, torch.float64)
    torchs = run(_torchs, tensors, options, dy)
    for impl in ("triton", "hybrid") if case is CASES["P5 BN, ReLU"] else ("triton",):
        assert_within_budget(
            run(functools.partial(norm_act, impl=impl), tensors, options, dy), torchs, golden, target[1]
        )


@targets
def test_exact_with_small_integers(target):
    """Statistics whose 1/sqrt is exact, and factors of two: every result to the bit."""
    shape, device = (3, 8, 6, 5), target[0]
    x, dy = small_integers(shape, target, seed=1, density=0.7), small_integers(shape, target, seed=2)
    tensors = {"x": x, "residual0": small_integers(shape, target, seed=3)}
    tensors |= {"running_mean": torch.ones(8, device=device), "running_var": torch.full((8,), 0.5, device=device)}
    tensors |= {"bn_weight": torch.tensor([1.0, -2.0] * 4, device=device), "bn_bias": torch.full((8,), 2.5).to(device)}
    options = {"eps": 0.5, "residual_at": "post_norm"}
    golden = run(norm_formula, tensors, options, dy, torch.float64)
    for name, result in run(ours, tensors, options, dy).items():
        assert torch.equal(result.double(), golden[name]), name


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append(operator.name())
        return operator(*args, **(kwargs or {}))


@one_target
@modes
def test_no_other_passes_over_memory(target, training):
    """Nothing runs but the norm's kernels; one image is allocated in each direction."""
    x = torch.empty(2, 8, 4, 4, device="meta", memory_format=torch.channels_last)
    vector, spec, launched = torch.empty(8, device="meta"), ConvBNActSpec(), []
    with runtime.intercepted(lambda kernel, *_args, **_options: launched.append(kernel.__name__)), _Watch() as watch:
        y, z, mean, _, invstd = fused.forward(
            x, None, None, vector, vector, vector, vector, [], spec, training=training, save=True, impl="triton"
        )
        grads = fused.backward(
            x, x, None, x, None, mean, invstd, vector, vector, spec,
            training=training, needs=[True, False, False, True, True, False], impl="triton",
        )  # fmt: skip
    first = ["_bn_stats_fwd_kernel", "_bn_finalize_fwd_kernel", "_bn_apply_fwd_kernel"]
    if not training:
        first = ["_bn_running_fwd_kernel", "_bn_apply_fwd_kernel", "_bn_running_fwd_kernel"]
    assert launched == [*first, "_bn_reduce_bwd_kernel", "_bn_sum_bwd_kernel", "_bn_apply_bwd_kernel"]
    assert z is None and y.shape == x.shape and grads[0].shape == x.shape
    assert {name for name in watch.seen if not name.startswith("aten::empty")} <= {"aten::unbind.int"}


@one_target
def test_formats_and_slices(target):
    """The same bits from whatever x lies in; the output has its format."""
    tensors, options, dy = _call(CASES["residuals after the norm"], target)
    expected = run(ours, tensors, options, dy)
    contiguous = run(ours, {name: t.contiguous() for name, t in tensors.items()}, options, dy)
    x = tensors.pop("x")
    tensors["wide"] = torch.cat([x, x], dim=1)
    sliced = []
    for way in (contextlib.nullcontext, tracing.no_replay):
        with way():
            sliced.append(run(lambda wide, **call: ours(wide[:, 8:], **call), tensors, options, dy))
        sliced[-1]["dx"] = sliced[-1].pop("dwide")[:, 8:]
    assert expected["y"].is_contiguous(memory_format=torch.channels_last) and contiguous["y"].is_contiguous()
    for results in (contiguous, *sliced):
        for name, result in expected.items():
            # the running statistics by a kernel, or by torch's operators: the order of three roundings may differ
            rtol = 4 * 2**-24 if "running" in name else 0
            torch.testing.assert_close(results[name], result, rtol=rtol, atol=0)


@one_target
@pytest.mark.parametrize("at", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (2, 1, 4, 4), (2, 8, 4, 4)], ids=str)
def test_the_output_has_the_inputs_format_where_both_fit(target, shape, at):
    """Sums by torch's operators would not keep it."""
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = rand(shape, target, seed=1, channels_last=False).clone(memory_format=memory_format)
        y = ours(x, residual=x, residual_at=at, training=True)
        assert is_channels_last(y) == is_channels_last(x) == (memory_format == torch.channels_last)


@one_target
@modes
def test_gradients_that_come_expanded_or_in_another_format(target, training):
    tensors, options, dy = _call(CASES["P5 BN, ReLU"], target, training)
    dy = dy.to(tensors["x"])
    for odd in (dy.contiguous(), dy[:, :1].expand_as(dy), dy.new_ones(()).expand_as(dy)):
        dense = odd.contiguous(memory_format=torch.channels_last)
        results = []
        for gradient in (odd, dense):
            leaves = [tensors[name].requires_grad_() for name in ("x", "bn_weight", "bn_bias")]
            results.append(torch.autograd.grad(ours(**tensors, **options), leaves, gradient))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


@one_target
@modes
def test_nan_stays_in_its_channel(target, training):
    tensors, options, dy = _call(CASES["P5 BN, ReLU"], target, training)
    expected = run(ours, tensors, options, dy)
    tensors["x"][1, 3, 2, 2] = float("nan")
    found = run(ours, tensors, options, dy)
    assert found["y"][1, 3, 2, 2].isnan() and (not training or found["y"][:, 3].isnan().all())
    for name, result in found.items():
        others = [c for c in range(16) if c != 3]
        index = (slice(None), others) if result.dim() == 4 else others
        assert torch.equal(result[index], expected[name][index]), name


@one_target
def test_only_what_is_asked_for_and_nothing_stale(target):
    tensors, options, _ = _call(CASES["P5 BN, ReLU"], target)
    scale = tensors["bn_weight"].requires_grad_()
    ours(**tensors, **options).sum().backward()
    assert scale.grad is not None and tensors["x"].grad is None
    y = ours(**tensors, **options)
    tensors["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    x = tensors["x"].requires_grad_()
    (grad,) = torch.autograd.grad(ours(**tensors, **options).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.pow(2).sum().backward()


@targets
@pytest.mark.parametrize("momentum", [0.3, None])
def test_state_as_a_batch_norm_updates_it(target, momentum):
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8, momentum=momentum, device=target[0]) for _ in range(2)]
    norms[1].double()
    spec = ConvBNActSpec(eps=norms[0].eps)
    for seed, training in enumerate((True, True, False)):
        x = rand((4, 8, 6, 6), target, seed=seed)
        y = bn_state.norm_act(norms[0].train(training), x, spec=spec, impl="triton")
        golden = norms[1].train(training)(x.double()).relu()
        # one rounding to the dtype, and a few in fp32
        eps = torch.finfo(target[1]).eps
        torch.testing.assert_close(y.double(), golden, rtol=0, atol=4 * eps * golden.max().item())
    torch.testing.assert_close(norms[0].double().state_dict(), norms[1].state_dict(), rtol=1e-6, atol=1e-6)
    assert norms[0].num_batches_tracked == 2


# the registered ops


def _arguments(target, training, shape=(2, 8, 4, 6), residuals=0):
    c = shape[1]
    x, *residuals = (rand(shape, target, seed=seed) for seed in range(1 + residuals))
    vectors = [rand((c,), (target[0], torch.float32), seed=seed).abs() for seed in range(4)]
    running = [None, None] if training else vectors[2:]
    spec = ConvBNActSpec(post_norm=True)
    return (x, None, None, *vectors[:2], *running, residuals, *registered_op.flat(spec), training, True, "triton"), spec


def _backward_arguments(arguments, outputs, spec, needs):
    x, gamma, beta, residuals, training = *arguments[:1], *arguments[3:5], arguments[7], arguments[-3]
    y, _, mean, _, invstd = outputs
    mask = y if residuals else None
    return x.clone(), x, None, x, mask, mean, invstd, gamma, beta, *registered_op.flat(spec), training, needs, "triton"


@one_target
@pytest.mark.parametrize("training, residuals", [(True, 0), (False, 1)], ids=["train", "eval, residual"])
def test_opcheck(target, training, residuals):
    arguments, spec = _arguments(target, training, residuals=residuals)
    torch.library.opcheck(torch.ops.rir_kernels.conv_bn_act.default, arguments)
    outputs = torch.ops.rir_kernels.conv_bn_act(*arguments)
    for needs in ([True, False, False, True, True, bool(residuals)], [False, False, False, True, False, False]):
        backward = _backward_arguments(arguments, outputs, spec, needs)
        torch.library.opcheck(torch.ops.rir_kernels.conv_bn_act_backward.default, backward)


@one_target
@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (2, 8, 1, 1), (2, 1, 4, 4), (2, 1, 3, 1), (1, 8, 4, 4)], ids=str)
def test_fakes_have_the_real_strides(target, shape):
    arguments, spec = _arguments(target, True, shape, residuals=1)
    real, fake = torch.ops.rir_kernels.conv_bn_act(*arguments), registered_op._forward_fake(*arguments)
    backward = _backward_arguments(arguments, real, spec, [True, False, False, True, True, True])
    real += torch.ops.rir_kernels.conv_bn_act_backward(*backward)
    fake += registered_op._backward_fake(*backward)
    for result, pretended in zip(real, fake, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (pretended.shape, pretended.stride(), pretended.dtype)


@one_target
@pytest.mark.parametrize("at", ["post_norm", "pre_norm"])
def test_compiles_without_a_graph_break(target, at):
    tensors, options, _ = _call(CASES["scaled"] | {"residual_at": at}, target)
    results = []
    for function in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        copies = {name: t.clone() for name, t in tensors.items()}
        residual, leaves = copies.pop("residual0"), [copies[name].requires_grad_() for name in ("x", "bn_weight")]
        y = function(**copies, residual=residual.requires_grad_(), **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), [*leaves, residual]), copies["running_mean"]])
    # the running statistics by a kernel, or by torch's operators: the order of three roundings may differ
    torch.testing.assert_close(results[1].pop(), results[0].pop(), rtol=4 * 2**-24, atol=0)
    for plain, graph in zip(*results, strict=True):
        assert torch.equal(plain, graph) and plain.stride() == graph.stride()


# plan replay, and backward fusion across layers


@pytest.fixture
def taken(monkeypatch):
    """A list that grows by one with each call that replays a plan; nothing is known at the start."""
    monkeypatch.setattr(plan_cache, "_planned", plans.Kinds())
    calls = []
    repeat = Plan.__call__
    monkeypatch.setattr(Plan, "__call__", lambda *args: calls.append(1) or repeat(*args))
    return calls


@one_target
@modes
@pytest.mark.parametrize("case", ["P5 BN, ReLU", "residuals after the norm", "residuals before the norm, scaled"])
def test_both_ways_agree(target, training, case, taken):
    tensors, options, dy = _call(CASES[case], target, training)
    for last in (True, False):
        tensors = tensors if last else {name: t.contiguous() for name, t in tensors.items()}
        with tracing.no_replay():
            long = run(ours, tensors, options, dy)
        for _ in range(2):  # the call that leaves the plan, and one that follows it
            short = run(ours, tensors, options, dy)
            for name, result in long.items():
                # the running statistics by a kernel, or by torch's operators: the order of three roundings may differ,
                # of terms of order one
                close = 4 * 2**-24 if "running" in name else 0
                torch.testing.assert_close(short[name], result, rtol=close, atol=close)
                assert short[name].stride() == result.stride()
    assert len(taken) == 8 and len(plan_cache._planned) == 2 and None not in plan_cache._planned.values()


class _PreActivation(nn.Module):
    """conv, BN, ReLU; BN, ReLU; conv, BN, ReLU."""

    def __init__(self, target):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(rir.ConvBNAct(8, 8, 1, impl="triton") for _ in range(2))
        self.bn = nn.BatchNorm2d(8)
        for bn in (self.bn, *(layer.bn for layer in self.layers)):
            nn.init.normal_(bn.weight, 1.0, 0.3)
            nn.init.normal_(bn.bias, 0.0, 0.3)
        self.to(*target).to(memory_format=torch.channels_last)

    def forward(self, x):
        self.inner = self.layers[0](x)
        self.outer = bn_state.norm_act(self.bn, self.inner, spec=ConvBNActSpec(eps=self.bn.eps), impl="triton")
        return self.layers[1](self.outer)


@one_target
def test_its_sums_come_from_the_convolution_behind(target, monkeypatch):
    """The convolution's own do not: there is no data gradient behind it."""
    spared, take = [], backward_fusion.Link.claim

    def watched(link, dy):
        spared.append((sums := take(link, dy)) is not None)
        return sums

    monkeypatch.setattr(backward_fusion.Link, "claim", watched)
    model, x = _PreActivation(target), rand((2, 8, 4, 4), target, seed=1).requires_grad_()
    results = []
    for way in (contextlib.nullcontext, tracing.no_replay):
        with way():
            loss = model(x).float().square().sum()
            results.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    assert spared == [False, True, False]
    # in each the errors grow like the root of the number of terms, and dz is rounded
    eps = max(8 * torch.finfo(torch.float32).eps, 2 * torch.finfo(target[1]).eps)
    for found, plain in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=0, atol=4 * eps * plain.abs().max().item())


@one_target
@modes
def test_recompute_makes_both_outputs_again(target, training):
    """The norm's from x, which is itself an output that is not kept."""
    model, x = _PreActivation(target).train(training), rand((2, 8, 4, 4), target, seed=1).requires_grad_()
    results = []
    for within, kept in ((contextlib.nullcontext, 2), (rir.recompute, 0)):
        with within():
            loss = model(x).float().square().sum()
        storages = [
            torch.multiprocessing.reductions.StorageWeakRef(t.untyped_storage()) for t in (model.inner, model.outer)
        ]
        del model.inner, model.outer
        assert sum(not storage.expired() for storage in storages) == kept
        results.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    eps = max(8 * torch.finfo(torch.float32).eps, 2 * torch.finfo(target[1]).eps)
    for plain, again in zip(*results, strict=True):
        # sums by another kernel, where the output that is made again is not offered to the layer behind
        torch.testing.assert_close(again, plain, rtol=0, atol=4 * eps * plain.abs().max().item())
    with rir.recompute():
        loss = model(x).float().sum()
    with torch.no_grad():
        model.layers[0].bn.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
