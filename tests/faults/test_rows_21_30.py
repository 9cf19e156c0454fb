"""Bad inputs and faults, 21 to 30: the norm's options, missing state, and what autograd may ask for.

The number in a test's name is a kind of bad input.
"""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import rir_kernels as rir
from rir_kernels.backends import fused, plans
from rir_kernels.common import tracing
from rir_kernels.dispatch import plan_cache
from tests.kernels.targets import ieee_fp32  # noqa: F401 (an autouse fixture)
from tests.support.forms import by, by_every_form, check_call, forms, launches, make_pair, modes, moved, norms, ways  # noqa: F401
from tests.support.helpers import conv_formula, make_call, module_results, output_gradient, run, scrambled
from tests.support.refusals import call_arguments, call_refused, module_refused

conv_bn_act = rir.functional.conv_bn_act
LAST = torch.channels_last
# fp32 sums of a few dozen numbers of order one, through at most two norms and back
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def images(where="cpu", seed=0, channels=4):
    """channels_last, as the kernels read them in place."""
    x = torch.randn(3, channels, 5, 6, generator=torch.Generator().manual_seed(seed))
    return x.to(where, memory_format=LAST)


def leaves_of(impl, where, training=True, **case):
    """(tensors that require gradients, other arguments) of a call."""
    tensors, options = make_call(
        channels=(4, 6), size=(5, 6), kernel=1, dtype=torch.float32, bias=True, training=training, **case
    )
    tensors = moved(tensors, where)
    tensors["x"] = tensors["x"].contiguous(memory_format=LAST)
    buffers = {name: tensors.pop(name) for name in ("running_mean", "running_var")}
    return {name: t.requires_grad_() for name, t in tensors.items()}, options | buffers | {"impl": impl}


# 21 and 22: eps and momentum


@pytest.mark.parametrize("eps", [0, 0.0, -1e-5, math.nan, math.inf, "1e-5", None, True])
def test_row_21_eps(eps):
    """ValueError, in training and in evaluation, by calls and constructors."""
    message = f"eps must be a positive number, got {eps!r}"
    for training in (True, False):
        for impl in ("auto", "reference", "triton"):
            call_refused(ValueError, message, eps=eps, training=training, impl=impl)
    for make in (lambda: rir.RiRLayer(4, 6, eps=eps), lambda: rir.RiRBlock(4, 6, eps=eps)):
        with pytest.raises(ValueError, match=r"eps must be a positive number"):
            make()
    with pytest.raises(ValueError, match=r"eps must be a positive number"):
        rir.ConvBNAct(4, 6, 3, eps=eps)


@forms
def test_row_21_eps_is_read_at_every_call(form):
    """ValueError once a norm's attribute has changed, also after a good call."""
    module, _ = make_pair(form)
    module(images())
    for bn in norms(module):
        bn.eps = 0.0
    message = "eps must be positive during training" if form == "fused" else "eps must be a positive number, got 0.0"
    with pytest.raises(ValueError, match=message):  # torch's words in a fused unit, whose batch is counted by then
        module(images())
    if form != "fused":
        module_refused(module, ValueError, message, inputs=[images()])


def test_row_22_momentum_is_a_number():
    """TypeError for a call, which has no count of batches for the cumulative average; ValueError for a module."""
    for momentum in (None, "0.1", True):
        call_refused(TypeError, f"momentum must be a number, got {momentum!r}", momentum=momentum)
    with pytest.raises(ValueError, match="momentum must be a number, or None"):
        rir.RiRLayer(4, 6, momentum="0.1")


@ways
@pytest.mark.parametrize("momentum", [0, 0.0, 1, 2.0, np.float32(0.25)])
def test_row_22_momentum_is_not_limited(momentum, impl, where):
    """0 freezes to the bit, 1 replaces, and others are as torch has them: twice, as the second call has a plan."""
    tensors, options = make_call(dtype=torch.float32, kernel=1, training=True, momentum=momentum)
    for _ in range(2):
        ours = check_call(tensors, options, impl, where)
    for name in ("running_mean", "running_var"):
        assert momentum != 0 or torch.equal(ours[name].cpu(), tensors[name])


@by_every_form()
@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
def test_row_22_momentum_by_form(form, momentum, impl, where):
    """As torch's modules over three batches: None is the cumulative average."""
    pair = make_pair(form, impl, where)
    for module in pair:
        for bn in norms(module):
            bn.momentum = momentum
            bn.reset_running_stats()
        for seed in range(3):
            module(images(where, seed))
    ours, theirs = ([bn.state_dict() for bn in norms(module)] for module in pair)
    for name in ("running_mean", "running_var"):
        # one norm over both streams in ours: the same numbers one behind the other
        torch.testing.assert_close(*(torch.cat([state[name] for state in side]) for side in (ours, theirs)), **CLOSE)
    assert {int(state["num_batches_tracked"]) for state in ours + theirs} == {3}


# 23 and 24: norms without parameters or statistics


@ways
@modes
@pytest.mark.parametrize("affine", ["none", "weight", "bias"])
def test_row_23_only_some_parameters(affine, training, impl, where):
    """Within twice torch's error."""
    tensors, options = make_call(dtype=torch.float32, kernel=1, training=training, affine=affine)
    check_call(tensors, options, impl, where)


@ways
def test_row_23_no_statistics(impl, where):
    """Within twice torch's error in training."""
    tensors, options = make_call(dtype=torch.float32, kernel=1, training=True, statistics=False)
    check_call(tensors, options, impl, where)


WITHOUT = {
    "affine": lambda bn: nn.BatchNorm2d(6, affine=False),
    "weight": lambda bn: bn.register_parameter("weight", None) or bn,
    "bias": lambda bn: bn.register_parameter("bias", None) or bn,
    "statistics": lambda bn: nn.BatchNorm2d(6, track_running_stats=False),
    "tracking any longer": lambda bn: setattr(bn, "track_running_stats", False) or bn,
}


@ways
@modes
@pytest.mark.parametrize("without", WITHOUT)
@pytest.mark.parametrize("form", ["unit", "fused"])
def test_rows_23_and_24_by_form(form, without, training, impl, where):
    """As torch's norm, state included: evaluation without statistics uses the batch's."""
    results = []
    for module in make_pair(form, impl, where):
        module.bn = WITHOUT[without](module.bn).to(where)
        results.append(module_results(module.train(training), images(where)))
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        torch.testing.assert_close(results[0][name], expected, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("without", WITHOUT)
@modes
def test_rows_23_and_24_of_a_layer(without, training):
    """As torch's norm behind the packed sum."""
    layer = scrambled(rir.RiRLayer(4, 6)).double()
    layer.bn = WITHOUT[without](layer.bn).double()
    layer.train(training)
    x = images().double()
    bn = copy.deepcopy(layer.bn)
    z = conv_formula(x, layer.weight.detach(), padding=1)
    z[:, :2] += x[:, :2]
    # fp64, numbers of order one to a hundred: rounding stays below 1e-11
    torch.testing.assert_close(layer(x), bn(z).relu(), rtol=1e-10, atol=1e-10)
    assert layer.bn.state_dict().keys() == bn.state_dict().keys()
    for name, expected in bn.state_dict().items():
        torch.testing.assert_close(layer.bn.state_dict()[name], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("missing", [["running_mean", "running_var"], ["running_mean"], ["running_var"]])
@pytest.mark.parametrize("impl", ["auto", "reference", "triton"])
def test_row_24_evaluation_without_statistics(missing, impl):
    """torch's own error; ValueError in training where one of the two is missing."""
    given = call_arguments() | dict.fromkeys(missing)
    with pytest.raises(RuntimeError) as torchs:
        nn.functional.batch_norm(torch.zeros(2, 6, 3, 3), given["running_mean"], given["running_var"], training=False)
    call_refused(RuntimeError, str(torchs.value), training=False, impl=impl, **dict.fromkeys(missing))
    if len(missing) == 1:
        call_refused(ValueError, "must either both be None or neither be None", impl=impl, **dict.fromkeys(missing))


# 25 to 29: what autograd may ask for


@ways
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "bn_weight", "bn_bias", "residual0"])
def test_row_25_only_some_gradients(wanted, impl, where):
    """The gradient alone that is wanted, with the bits that it has among all."""
    tensors, options = make_call(dtype=torch.float32, kernel=1, training=True, bias=True, residuals=(6,))
    dy = output_gradient(tensors, options, 1e-3).to(where)
    every = run(by(impl), moved(tensors, where), options, dy)
    copies = {name: t.clone() for name, t in moved(tensors, where).items()}
    copies[wanted].requires_grad_()
    residual = copies.pop("residual0")
    conv_bn_act(**copies, residual=residual, **options, impl=impl).backward(dy.float())
    leaves = copies | {"residual0": residual}
    assert [name for name, t in leaves.items() if t.grad is not None] == [wanted]
    assert torch.equal(leaves[wanted].grad, every[f"d{wanted}"])


def test_row_25_no_work_for_frozen_tensors(monkeypatch, device):
    """The kernels behind gradients that nobody asked for do not run; nothing requires grad where nothing does."""
    from rir_kernels.backends import cudnn
    from rir_kernels.triton.launch import batchnorm, conv, wgrad

    ran = []

    def watch(module, name):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **options: ran.append(name) or run(*args, **options))

    for module in (conv, cudnn):
        watch(module, "conv_data_grad")
    for module in (wgrad, cudnn):
        watch(module, "conv_weight_grad")
    for name in ("bn_reduce", "bn_apply_grad"):
        watch(batchnorm, name)
    expected = {
        "x": {"bn_reduce", "bn_apply_grad", "conv_data_grad"},
        "weight": {"bn_reduce", "bn_apply_grad", "conv_weight_grad"},
        "bn_weight": {"bn_reduce"},
        "bn_bias": {"bn_reduce"},
    }
    for impl in ("triton", "hybrid"):
        for wanted, kernels in expected.items():
            leaves, others = leaves_of(impl, device)
            leaves = {name: t.detach().requires_grad_(name == wanted) for name, t in leaves.items()}
            with tracing.no_replay():  # a plan is recorded once: here every launch is made anew
                conv_bn_act(**leaves, **others).sum().backward()
            assert set(ran) == kernels, (impl, wanted)
            ran.clear()
        frozen = {name: t.detach() for name, t in leaves.items()}
        assert not conv_bn_act(**frozen, **others).requires_grad


@by_every_form()
def test_row_25_frozen_norms_by_form(form, impl, where):
    """The gradients of the rest are as before to the bit, the norm's None; a frozen module needs none."""
    module, _ = make_pair(form, impl, where)
    expected = module_results(module, images(where))
    for bn in norms(module):
        bn.requires_grad_(False)
    for name, result in module_results(module, images(where)).items():
        assert result is None if name.endswith(("bn.weight", "bn.bias")) else torch.equal(result, expected[name]), name
    assert not module.requires_grad_(False)(images(where)).requires_grad


@pytest.mark.parametrize("impl", ["triton", "hybrid"])
@pytest.mark.parametrize("calls", [1, 2])
def test_row_26_second_derivatives_by_kernels(calls, impl, device):
    """RuntimeError that says what to use instead, for a gradient penalty; by a plan (the second call) too."""
    for _ in range(calls):
        leaves, others = leaves_of(impl, device)
        y = conv_bn_act(**leaves, **others)
        (grad,) = torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivatives: use impl="torch"'):
        (y.sum() + grad.pow(2).sum()).backward()
    assert all(t.grad is None for t in leaves.values())


@pytest.mark.parametrize("impl", ["triton", "hybrid"])
@pytest.mark.parametrize("asked", ["x", "weight", "bn_weight", "residual"])
@pytest.mark.parametrize("calls", [1, 2])
def test_row_26_second_derivatives_of_one_tensor_alone(calls, asked, impl, device):
    """Where a graph is walked for one tensor, the gradient of a gradient may not be left out as if it were zero."""
    leaves, others = leaves_of(impl, device, residuals=(3,))
    leaves["residual"] = leaves.pop("residual0")

    def gradient(**changed):
        y = conv_bn_act(**(leaves | changed), **others)
        return torch.autograd.grad(y.sum(), changed.get(asked, leaves[asked]), create_graph=True)[0]

    for _ in range(calls):
        grad = gradient()
    refused = pytest.raises(RuntimeError, match=r'no second derivatives: use impl="torch"')
    with refused:
        torch.autograd.grad(grad.pow(2).sum(), leaves[asked], allow_unused=True)
    grad = gradient()
    with refused:
        grad.pow(2).sum().backward(inputs=[leaves[asked]])
    grad = gradient()
    with refused:  # of any other tensor too
        torch.autograd.grad(grad.pow(2).sum(), [t for name, t in leaves.items() if name != asked], allow_unused=True)
    with refused:
        torch.autograd.functional.hessian(
            lambda t: conv_bn_act(**(leaves | {asked: t}), **others).sum(), leaves[asked].detach()
        )


@forms
def test_row_26_second_derivatives_by_torch(form):
    """The gradients of a gradient penalty are those of torch's modules."""
    penalties = []
    for module in make_pair(form):
        module, x = module.double(), images().double().requires_grad_()
        (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(grad.square().sum(), x)[0])
    # fp64, sums of squares of gradients of order a hundred
    torch.testing.assert_close(*penalties, rtol=1e-8, atol=1e-8)


@by_every_form()
def test_row_27_backward_twice(form, impl, where):
    """torch's own error; with retain_graph the same gradients again."""
    module, _ = make_pair(form, impl, where)
    y = module(images(where)).sum()
    parameters = list(module.parameters())
    first, again = (torch.autograd.grad(y, parameters, retain_graph=keep) for keep in (True, False))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, parameters)


@ways
@pytest.mark.parametrize("changed", ["x", "weight", "bn_weight"])
def test_row_28_changed_between_forward_and_backward(changed, impl, where):
    """The version counter's error, for everything that backward reads; also by a plan (the second call)."""
    for _ in range(2):
        leaves, others = leaves_of(impl, where)
        y = conv_bn_act(**leaves, **others)
        with torch.no_grad():
            leaves[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), list(leaves.values()))


@ways
def test_row_28_a_copied_input_may_change(impl, where):
    """Where x was converted backward reads the copy: the gradients are those of x as it was. torch reads x itself."""
    leaves, others = leaves_of(impl, where)
    x = leaves.pop("x").detach().contiguous()
    expected = torch.autograd.grad(conv_bn_act(x, **leaves, **others).sum(), leaves["weight"])
    y = conv_bn_act(x, **leaves, **others)
    x.add_(1)
    if impl == "torch":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        assert torch.equal(torch.autograd.grad(y.sum(), leaves["weight"])[0], expected[0])


@ways
@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("adjacent", [True, False])
def test_row_28_a_stream_changed_before_backward(adjacent, changed, impl, where):
    """Refused where the streams are read in place; of a copy the gradient is that of the streams as they were."""
    torch.manual_seed(0)
    x = images(where, channels=8)
    streams = (x[:, :4], x[:, 4:]) if adjacent else (x[:, :4].clone(), x[:, 4:].clone())
    layer = rir.RiRLayer(8, 6, kernel_size=1, impl=impl).to(where)
    expected = torch.autograd.grad(layer(*streams)[0].sum(), layer.weight)
    r_out, _ = layer(*streams)
    streams[changed].add_(1)
    if adjacent:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            r_out.sum().backward()
    else:
        assert torch.equal(torch.autograd.grad(r_out.sum(), layer.weight)[0], expected[0])


@by_every_form()
def test_row_29_two_forwards_then_two_backwards(form, impl, where):
    """The gradients are those of one after the other, to the bit."""
    module, _ = make_pair(form, impl, where)

    def gradients(backward_last):
        twin, losses = copy.deepcopy(module), []
        for seed in range(2):
            loss = twin(images(where, seed)).square().sum()
            losses.append(loss) if backward_last else loss.backward()
        for loss in losses:
            loss.backward()
        return [p.grad for p in twin.parameters()]

    for together, apart in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(together, apart)


# 30: no_grad and inference_mode


@by_every_form()
@modes
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_row_30_without_gradients(form, mode, training, impl, where):
    """The numbers and statistics of a call with gradients; nothing is saved. Twice, as the second has a plan."""
    module, _ = (m.train(training) for m in make_pair(form, impl, where))
    twin, saved = copy.deepcopy(module), []
    for seed in range(2):
        expected = twin(images(where, seed)).detach()
        with mode(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = module(images(where, seed))
        # evaluation with gradients normalizes the z that it keeps: another order of roundings
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.grad_fn is None and not y.requires_grad and y.is_inference() == (mode is torch.inference_mode)
    assert not saved
    for (name, buffer), theirs in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, theirs, rtol=1e-6, atol=1e-6, msg=name)  # a norm behind such an output
    assert {int(bn.num_batches_tracked) for bn in norms(module)} == {2 * training}


def test_row_30_the_kernels_are_not_asked_to_save(monkeypatch, device):
    """Nor do they write z in evaluation; with gradients they do both."""
    asked = []
    forward = fused.forward
    monkeypatch.setattr(fused, "forward", lambda *a, save, **o: asked.append(save) or forward(*a, save=save, **o))
    leaves, others = leaves_of("triton", device, training=False)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with tracing.no_replay(), mode():
            conv_bn_act(**leaves, **others)
    assert asked == [False, False, True]
    monkeypatch.setattr(plan_cache, "_planned", plans.Kinds())
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            conv_bn_act(**leaves, **others)
    assert [planned.saves for planned in plan_cache._planned.values()] == [False, True]  # the first two share one


@ways
def test_row_30_a_module_made_in_inference_mode(impl, where):
    """As torch's modules there: its buffers have no version to count, and are updated all the same."""
    with torch.inference_mode():
        ours, theirs = make_pair("unit", impl, where)
        for seed in range(3):
            torch.testing.assert_close(ours(images(where, seed)), theirs(images(where, seed)), **CLOSE)
    for (name, buffer), expected in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, **CLOSE, msg=name)
