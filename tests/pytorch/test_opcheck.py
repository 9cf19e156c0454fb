"""torch's own checker over the forms of the registered ops that tests/kernels does not give it."""

import pytest
import torch

from rir_kernels.autograd import registered_op
from rir_kernels.common.spec import ConvBNActSpec
from tests.support.emulation import gpu

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreter),
    pytest.param(gpu().type, marks=pytest.mark.gpu, id="cuda"),
]


def values(*shape, seed=1):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


# name: (spec, kernel size or None for the norm alone, channels of residuals, bias, affine, implementations)
FORMS = {
    "bias, residuals before the norm, scaled": (
        ConvBNActSpec(stride=(2, 2), branch_scale=0.5), 1, (4, 3), True, True, ("triton", "hybrid"),
    ),
    "groups, dilation": (
        ConvBNActSpec(padding=(2, 2), dilation=(2, 2), groups=2), 3, (), False, True, ("hybrid",),
    ),
    "bias, no affine, no relu": (ConvBNActSpec(activation=None), 1, (), True, False, ("triton",)),
    "norm alone": (ConvBNActSpec(), None, (), False, True, ("triton",)),
    "norm alone, no affine, no relu, scaled": (
        ConvBNActSpec(activation=None, post_norm=True, branch_scale=0.5), None, (4,), False, False, ("triton",),
    ),
}  # fmt: skip
CASES = [(name, impl, training) for name, form in FORMS.items() for impl in form[-1] for training in (True, False)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "impl", "training"), CASES)
def test_every_form(name, impl, training, device):
    spec, kernel, residuals, bias, affine, _ = FORMS[name]
    x = values(2, 4, 4, 4)
    weight = None if kernel is None else values(4, 4 // spec.groups, kernel, kernel, seed=2)
    shape = spec.output_shape(x, weight)
    norm = [values(4, seed=3), values(4, seed=4)] if affine else [None, None]
    statistics = [None, None] if training else [values(4, seed=5), values(4, seed=6).abs()]
    tensors = [x, weight, values(4, seed=7) if bias else None, *norm, *statistics]
    tensors = [t if t is None else t.to(device) for t in tensors]
    residuals = [values(shape[0], channels, *shape[2:], seed=8).to(device) for channels in residuals]
    forward, backward = torch.ops.rir_kernels.conv_bn_act.default, torch.ops.rir_kernels.conv_bn_act_backward.default
    # schema, aliasing, fakes with real strides, and the graph of a symbolic shape
    torch.library.opcheck(forward, (*tensors, residuals, *registered_op.flat(spec), training, training, impl))
    if not training:  # where nothing is saved; what is saved in evaluation, and its backward, tests/kernels checks
        return
    y, z, mean, _, invstd = forward(*tensors, residuals, *registered_op.flat(spec), training, True, impl)
    x, weight, _, gamma, beta, *_ = tensors
    mask = y if spec.post_norm and residuals and spec.activation else None
    needs = [True, weight is not None, bias, affine, affine, bool(residuals)]
    saved = (x, weight, x if weight is None else z, mask, mean, invstd, gamma, beta)
    torch.library.opcheck(backward, (torch.ones_like(y), *saved, *registered_op.flat(spec), training, needs, impl))
