"""The registered ops: schema, fakes with real strides, autograd, torch.compile."""

import pytest
import torch

import rir_kernels as rir
from rir_kernels.autograd import registered_op
from rir_kernels.common.spec import ConvBNActSpec

from .targets import TARGETS, ieee_fp32, rand  # noqa: F401 (an autouse fixture)

targets = pytest.mark.parametrize("target", TARGETS)
impls = pytest.mark.parametrize("impl", ["triton", "hybrid"])

SPECS = {
    "shortcut": (ConvBNActSpec(padding=(1, 1), shortcut_channels=4), ()),
    "stride 2, residual after the norm": (ConvBNActSpec(stride=(2, 2), padding=(1, 1), post_norm=True), (8,)),
    "no norm parameters, no relu": (ConvBNActSpec(padding=(1, 1), activation=None), ()),
}
specs = pytest.mark.parametrize("spec, residuals", SPECS.values(), ids=SPECS.keys())


def _forward_arguments(target, spec, residuals, training, impl, shape=(2, 8, 4, 6)):
    stats = (target[0], torch.float32)
    x, weight = rand(shape, target, seed=1), rand((8, shape[1], 3, 3), target, seed=2)
    out = spec.output_shape(x, weight)
    affine = [rand((8,), stats, seed=3), rand((8,), stats, seed=4)] if spec.activation else [None, None]
    running = [None, None] if training else [rand((8,), stats, seed=5), rand((8,), stats, seed=6).abs()]
    residuals = [rand((out[0], c, *out[2:]), target, seed=7) for c in residuals]
    return (x, weight, None, *affine, *running, residuals, *registered_op.flat(spec), training, True, impl)


@specs
@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[2]])  # fp32 in the interpreter, bf16 on a GPU: enough for this
@impls
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_opcheck(spec, residuals, target, impl, training):
    """Schema, fakes (shapes, dtypes, strides) and dispatch of both ops, by torch's own checker."""
    arguments = _forward_arguments(target, spec, residuals, training, impl)
    torch.library.opcheck(torch.ops.rir_kernels.conv_bn_act.default, arguments)
    x, weight, _, gamma, beta, *_ = arguments
    y, z, mean, _, invstd = torch.ops.rir_kernels.conv_bn_act(*arguments)
    mask = y if spec.activation and residuals else None
    for needs in ([True] * 6, [False, True, False, True, False, False]):
        backward = (
            rand(tuple(y.shape), target, seed=8), x, weight, z, mask, mean, invstd, gamma, beta,
            *registered_op.flat(spec), training, needs, impl,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.rir_kernels.conv_bn_act_backward.default, backward)


@targets
@impls
@pytest.mark.parametrize(
    "shape", [(2, 8, 4, 6), (2, 8, 1, 1), (2, 1, 4, 4), (2, 1, 3, 1), (1, 8, 4, 4), (2, 5, 3, 4)], ids=str
)
def test_fakes_have_the_real_strides(target, impl, shape):
    """Channels of one, single pixels and single images are where strides are ambiguous; opcheck sees but one shape."""
    spec = ConvBNActSpec(padding=(1, 1))
    arguments = _forward_arguments(target, spec, (), True, impl, shape)
    real = torch.ops.rir_kernels.conv_bn_act(*arguments)
    fake = registered_op._forward_fake(*arguments)
    y, z, mean, _, invstd = real
    backward = (
        y, *arguments[:2], z, None, mean, invstd, *arguments[3:5], *registered_op.flat(spec), True, [True] * 6, impl
    )  # fmt: skip
    real += torch.ops.rir_kernels.conv_bn_act_backward(*backward)
    fake += registered_op._backward_fake(*backward)
    for ours, pretended in zip(real, fake, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (pretended.shape, pretended.stride(), pretended.dtype)


@targets
@impls
def test_gradients_that_come_expanded_or_in_another_format(target, impl):
    """y.sum() hands an expanded gradient (stride 0), an NCHW consumer a contiguous one."""
    layer = rir.RiRLayer(8, 8, impl=impl, device=target[0], dtype=target[1])
    x = rand((2, 8, 4, 4), target, seed=1)
    dy = rand((2, 8, 4, 4), target, seed=2)
    expanded = torch.ones((), device=target[0], dtype=target[1]).expand(2, 8, 4, 4)
    for grad in (expanded, dy, dy[:, :1].expand_as(dy)):
        dense, odd = (
            torch.autograd.grad(layer(x), layer.weight, g)[0]
            for g in (grad.contiguous(memory_format=torch.channels_last), grad)
        )
        assert torch.equal(dense, odd)
    contiguous = torch.autograd.grad(layer(x), layer.weight, dy.contiguous())[0]
    assert torch.equal(contiguous, torch.autograd.grad(layer(x), layer.weight, dy)[0])


@targets
@impls
def test_compiles_without_a_graph_break(target, impl):
    """fullgraph=True raises at any graph break; results are those of eager, bit for bit: the same kernels run.

    But for the running statistics, which torch's operators update in a graph: the order of three roundings may differ.
    """
    layer = rir.RiRLayer(8, 8, impl=impl, device=target[0], dtype=target[1])
    x = rand((2, 8, 4, 4), target, seed=1).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        layer.bn.reset_running_stats()
        y = function(x)
        results.append([y.detach(), layer.bn.running_mean.clone(), *torch.autograd.grad(y.sum(), [x, layer.weight])])
    for index, (eager, graph) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(graph, eager, rtol=4 * 2**-24 if index == 1 else 0, atol=0)


@targets
@impls
def test_weight_gradient_has_the_weights_format(target, impl):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer = rir.RiRLayer(8, 8, impl=impl, device=target[0], dtype=target[1]).to(memory_format=memory_format)
        layer(rand((2, 8, 4, 4), target, seed=1)).sum().backward()
        assert layer.weight.grad.is_contiguous(memory_format=memory_format)
