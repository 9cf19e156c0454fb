"""Calls that cannot be one operation run the modules one by one: same results, dtypes, errors and buffers as unfused.

Both models then run the same operations in the same order, so they are compared bit for bit.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rir_kernels import reference
from rir_kernels.surgery import bypass, fuse_
from tests.support.surgery_helpers import CLOSE, X, assert_same, fused_calls, pair_of, settle
from tests.support.surgery_models import unit, with_forward


def of(function):
    return with_forward(function)(bias=True)


def pair(model):
    return pair_of(settle(model), 1)


def outcome(model, *inputs):
    """(dtype and values of the result, or class and text of the error), and the buffers afterwards."""
    try:
        y = model(*inputs)
        found = y.dtype, y.tolist()
    except Exception as error:
        found = type(error), str(error)
    return found, [buffer.tolist() for buffer in model.buffers()]


def plain(m, x):
    return m.relu(m.bn(m.conv(x)))


def preactivation(m, x):
    return F.relu(m.bn(x))


def added(m, x, other):
    return m.relu(m.bn(m.conv(x)) + other)


def added_in_place(m, x, other):
    y = m.bn(m.conv(x))
    y += other
    return m.relu(y)


def scaled_in_place(m, x, other):
    y = m.bn(m.conv(x))
    y *= 0.3
    y += other
    return y.relu_()


def before_the_norm(m, x, other):
    y = m.conv(x)
    y += other
    return m.relu(m.bn(y))


def added_by_a_method(m, x, other):
    return F.relu(m.bn(m.conv(x)).add_(other), inplace=True)


@pytest.mark.parametrize(
    "function", [added, added_in_place, added_by_a_method, scaled_in_place, before_the_norm], ids=lambda f: f.__name__
)
def test_sums_of_other_dtypes_and_shapes(function):
    """In place a sum keeps its dtype and shape, or raises; out of place it is promoted and broadcast."""
    fused, original = pair(of(function))
    assert_same(fused, original, X, X)
    for model in (fused, original):
        model.bfloat16()
    x = X.bfloat16()
    wide = torch.float32 if function is added else torch.bfloat16
    for other in (X.float(), x[:, :, :1, :1], x[:1], x.expand(2, 2, 4, 6, 6), x[:, :3], x[:, :, :2]):
        with fused_calls(0):
            expected = outcome(original, x, other)
            assert outcome(fused, x, other) == expected
    with fused_calls(0):
        assert fused(x, X.float()).dtype == wide


def test_what_a_hook_keeps_is_changed_in_place():
    """With a hook the modules run one by one, and the in-place sum is written into the output that the hook got."""
    seen = {}
    for model in pair(of(added_in_place)):
        model.bn.register_forward_hook(lambda _module, _inputs, y, model=model: seen.__setitem__(model, y))
        with torch.no_grad(), fused_calls(0):
            assert torch.equal(model(X, X), seen[model].relu())
    fused, original = seen.values()
    assert torch.equal(fused, original)


INPUTS = {
    "five channels": torch.randn(2, 5, 6, 6, dtype=torch.float64),
    "float32": X.float(),
    "uint8": X.byte(),
    "complex": X.to(torch.complex128),
    "image": X[0],
    "row": X[0, 0],
    "smaller than the kernel": X[:, :, :0],
    "no batch": X[:0],
    "sparse": X.to_sparse(),
    "list": [X],
    "nothing": None,
}


@pytest.mark.parametrize("function", [plain, preactivation], ids=lambda f: f.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_inputs_that_are_refused(function, training):
    fused, original = pair(of(function).train(training))
    for name, x in INPUTS.items():
        assert outcome(fused, x) == outcome(original, x), name


MISFITS = {
    "weight of another dtype": lambda m: m.conv.half(),
    "norm of another dtype": lambda m: m.bn.float(),
    "norm of another size": lambda m: setattr(m, "bn", nn.BatchNorm2d(5).double()),
    "no weight": lambda m: setattr(m.conv, "weight", None),
    "one statistic": lambda m: setattr(m.bn, "running_mean", None),
    "bias of another size": lambda m: setattr(m.conv, "bias", nn.Parameter(m.conv.bias[:3])),
    "padding that goes with no stride": lambda m: m.conv.__dict__.update(padding="same", stride=(2, 2)),
    "negative eps": lambda m: setattr(m.bn, "eps", -1e-5),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MISFITS)
def test_modules_that_do_not_fit_each_other(name, training):
    fused, original = pair(of(plain).train(training))
    for model in (fused, original):
        MISFITS[name](model)
    assert outcome(fused, X) == outcome(original, X)


# (value, fused calls): fused if the number can be converted, one by one if only torch can read it
NUMBERS = {
    "stride, numpy": (np.int64(2), 1),
    "stride, numpy's pair": ((np.int64(2), np.int32(1)), 1),
    "stride, one": ((2,), 1),
    "stride, list": ([2, 1], 1),
    "stride, tensor": (torch.tensor(2), 0),
    "padding, numpy": (np.int64(2), 1),
    "padding, tensors": ((torch.tensor(2), 1), 0),
    "dilation, numpy": (np.int64(1), 1),
    "dilation, three": ((1, 1, 1), 0),
    "groups, numpy": (np.int64(1), 1),
    "eps, tensor": (torch.tensor(0.1), 0),
    "eps, numpy": (np.float64(0.1), 1),
    "eps, numpy's float32": (np.float32(0.1), 0),
    "momentum, tensor": (torch.tensor(0.3), 0),
    "momentum, numpy": (np.float64(0.3), 1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_other_types(name):
    fused, original = pair(of(plain))
    value, calls = NUMBERS[name]
    attribute = name.partition(",")[0]
    for model in (fused, original):
        setattr(model.bn if attribute in ("eps", "momentum") else model.conv, attribute, value)
    (found, buffers), (expected, others) = outcome(fused, X), outcome(original, X)
    assert found[0] == expected[0]
    if isinstance(expected[0], torch.dtype):
        np.testing.assert_allclose(found[1], expected[1], **CLOSE)
    else:
        assert found == expected
    for buffer, other in zip(buffers, others, strict=True):
        np.testing.assert_allclose(buffer, other, **CLOSE)
    fresh = copy.deepcopy(original)
    assert len(fuse_(fresh).replaced) == (1 if "momentum" in name else calls)


def replica(model):
    """A copy as nn.parallel.replicate makes it for each GPU: parameters are plain tensors in the instance's dict."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, value in module._modules.items():
            setattr(twin, name, None if value is None else copies[value])
        for name, value in module._parameters.items():
            if value is None:
                twin._parameters[name] = None
            else:
                setattr(twin, name, value.clone())
        for name, value in module._buffers.items():
            setattr(twin, name, value)
    return copies[model]


def flattened(model):
    """The model as FSDP leaves it with flat parameters: views of one tensor replace the parameters."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                view, flat = flat[: parameter.numel()].view_as(parameter), flat[parameter.numel() :]
                delattr(module, name)
                setattr(module, name, view)
    return model


def frozen(model):
    """Makes the weight a buffer."""
    weight = model.conv.weight.detach()
    del model.conv.weight
    model.conv.register_buffer("weight", weight)
    return model


def shadowed(model):
    """Puts a tensor into the instance's dict, where it takes precedence over the parameter."""
    model.conv.__dict__["weight"] = 2 * model.conv.weight.detach()
    return model


CHANGES = [(change, False) for change in (replica, flattened, frozen, shadowed)] + [(replica, True), (flattened, True)]


@pytest.mark.parametrize(("change", "layer"), CHANGES)
def test_weights_that_are_not_parameters(change, layer):
    fused, original = pair((reference.RiRLayer(4, 4) if layer else of(plain)).eval())
    fused, original = change(fused), change(original)
    with torch.no_grad():
        with fused_calls(1):
            found = fused(X)
        torch.testing.assert_close(found, original(X), **CLOSE)


def test_bias_of_a_layer_that_is_not_a_parameter():
    """The layer has no bias; one that is set later is noticed and added."""
    fused, original = pair(reference.RiRLayer(4, 4).eval())
    for model in (fused, original):
        del model.conv_rr._parameters["bias"]
        model.conv_rr.bias = torch.ones(model.conv_rr.out_channels, dtype=torch.float64)
    with fused_calls(0):
        assert torch.equal(fused(X), original(X))


@pytest.mark.parametrize("layer", [False, True])
def test_a_hook_on_all_modules(layer):
    fused, original = pair(reference.RiRLayer(4, 4) if layer else of(plain))
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _inputs, y: 2 * y if isinstance(module, nn.Conv2d) else None
    )
    try:
        with fused_calls(0):
            expected = original(X)
            assert torch.equal(fused(X), expected)
    finally:
        handle.remove()
    assert not torch.equal(original(X), expected)
    with fused_calls(1):
        fused(X)


def with_an_option(m, x, other=None, *, shift=None):
    y = m.relu(m.bn(m.conv(x)))
    y = y if shift is None else y + shift
    return y if other is None else y + other


def test_other_arguments():
    """Only the call that was traced is fused: the one with no argument that has a default."""
    others = [((X, X), {}, 0), ((X,), {"other": X}, 0), ((X,), {"shift": 1.0}, 0)]
    for args, options, calls in [((X,), {}, 1), ((), {"x": X}, 1), *others]:
        fused, original = pair(of(with_an_option))
        with fused_calls(calls) as recorded:
            found = fused(*args, **options)
        reason = "it was called with other arguments than its forward was traced with"
        assert calls or {call.reason for call in recorded} == {reason}
        torch.testing.assert_close(found, original(*args, **options), **CLOSE)
    assert outcome(fused, X, X, X) == outcome(original, X, X, X)


def test_pairs_are_python_integers():
    pairs = [bypass.pair(value) for value in (np.int64(2), (np.int64(2), 1), [2, np.int32(1)], (2,), 2, True)]
    assert pairs == [(2, 2), (2, 1), (2, 1), (2, 2), (2, 2), (1, 1)]
    assert {type(one) for found in pairs for one in found} == {int}
    assert [bypass.pair(value) for value in (torch.tensor(2), (1, 1, 1), 2.0, "same", None)] == [None] * 5


@pytest.mark.parametrize(
    ("make", "name"),
    [*((unit, name) for name in "012"), *((lambda: of(plain), name) for name in ("conv", "bn", "relu"))],
)
@pytest.mark.parametrize("how", ["None", "deleted"])
def test_missing_child(make, name, how):
    """The call raises the error of the unfused module, or returns what a Sequential returns without the child."""
    fused, original = pair(make())
    for model in (fused, original):
        if how == "None":
            model._modules[name] = None
        else:
            delattr(model, name)
    (found, *_), (expected, *_) = outcome(fused, X), outcome(original, X)
    assert str(found).replace("Fused", "") == str(expected)  # the error may name the class
