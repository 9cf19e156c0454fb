"""fuse_ moves the parts of a unit to its last one, and refuses only where an operation in between would notice."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import CLOSE, X, pair_of, settle
from tests.support.surgery_models import Layer, Opaque, with_forward


def _halve(scale, x):
    x.mul_(scale)


OPS = torch.library.Library("rir_tests", "FRAGMENT")
OPS.define("halved_(float scale, Tensor(a!) x) -> ()")
OPS.define("doubled(Tensor x) -> Tensor")
OPS.impl("halved_", _halve, "CPU")
OPS.impl("doubled", lambda x: 2 * x, "CPU")


class Zero(nn.Module):
    """Overwrites its input."""

    def forward(self, v):
        v.mul_(0)
        return v


class Same(nn.Module):
    """Returns a view of its input, which its class does not declare."""

    def forward(self, v):
        return v[:]


class Net(Layer):
    def __init__(self):
        super().__init__(bias=True)
        self.first, self.zero, self.same, self.relu = nn.Conv2d(4, 4, 1), Zero(), Same(), nn.ReLU(inplace=True)
        self.nothing, self.fresh, self.drop = nn.Identity(), nn.Sequential(nn.Conv2d(4, 4, 1), self.relu), nn.Dropout()
        self.pool, self.flat = nn.MaxPool2d(1), nn.Sequential(nn.Identity(), self.relu)
        self.around = Opaque(nn.Conv2d(4, 4, 1), self.bn)
        self.alike, self.hooked = nn.BatchNorm2d(4, momentum=0.5), nn.Conv2d(4, 4, 1)
        self.hooked.register_forward_pre_hook(lambda _module, inputs: (inputs[0].mul_(2),))


class Between(Net):
    """`operation` runs between the convolution and the norm."""

    def forward(self, x):
        y = self.conv(x)
        self.operation(x)
        return F.relu(self.bn(y))


class Residual(Net):
    """`operation` computes the residual after the norm."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        return F.relu(y + self.operation(x))


@fx.wrap
def zero(v):
    return v.mul_(0)


BETWEEN_NOTICED = {
    "view_by_index": lambda m, x: m.zero(x[:, :2]),
    "view_by_method": lambda m, x: x.flatten(1).mul_(2),
    "view_by_attribute": lambda m, x: x.data.add_(1),
    "in_place_child": lambda m, x: m.relu(x.view(-1)),
    "in_place_sequential": lambda m, x: m.flat(x),
    "custom_op": lambda m, x: torch.ops.rir_tests.halved_(0.5, x),
    "custom_overload": lambda m, x: torch.ops.rir_tests.halved_.default(0.5, x=x[0]),
    "wrapped_function": lambda m, x: zero(x[:1]),
    "out": lambda m, x: torch.mul(x, 2, out=x),
    "function_in_place": lambda m, x: F.leaky_relu(x, 0.1, True),
}
RESIDUAL_NOTICED = {
    "child_in_place": lambda m, x: m.zero(x),
    "hooked_child": lambda m, x: m.hooked(x),
    "other_names_of_the_norm": lambda m, x: m.around(m.first(x)),
    "tied_statistics": lambda m, x: m.alike(x),
    "functional_norm": lambda m, x: F.batch_norm(
        x, m.bn.running_mean, m.bn.running_var, training=m.bn.track_running_stats
    ),
}


def view_by_unknown_child(m, x):
    v = m.same(x)
    y = m.conv(x)
    v += 1
    return F.relu(m.bn(y))


def view_by_known_child(m, x):
    y = m.conv(m.nothing(x))
    x.relu_()
    return F.relu(m.bn(y))


def view_by_list(m, x):
    first, second = x.chunk(2, 1)
    y = m.conv(x)
    second.clamp_(min=0)
    return F.relu(m.bn(y) + first.mean())


def two_views(m, x):
    y = m.conv(x[:1])
    x[:, 1:].zero_()
    return F.relu(m.bn(y))


def of_the_residual(m, x):
    s = m.first(x)
    y = m.bn(m.conv(x)) + s
    s[:, 1].zero_()
    return F.relu(y)


def weight(m, x):
    y = m.conv(x)
    m.conv.weight.data.mul_(2)
    return F.relu(m.bn(y) + m.conv(x))


def read_statistics(m, x):
    y = m.bn(m.conv(x))
    s = m.bn.running_mean * 1
    return F.relu(y + x) * s.view(1, -1, 1, 1)


def statistics_as_residual(m, x):
    s = m.bn.running_mean.view(1, -1, 1, 1).expand(2, 4, 6, 6)
    return F.relu(m.bn(m.conv(x)) + s)


NOTICED = (
    view_by_unknown_child, view_by_known_child, view_by_list, two_views, of_the_residual, weight, read_statistics,
    statistics_as_residual,
)  # fmt: skip

RESIDUAL_UNNOTICED = {
    "cat_along_1": lambda m, x: torch.cat((x[:, :2], x[:, :2] * 0), 1),
    "pooling_child": lambda m, x: m.pool(x),
    "pool_between": lambda m, x: F.avg_pool2d(x, 3, 1, 1),
    "softmax_along_1": lambda m, x: F.softmax(x, 1),
    "dropout_without_in_place": lambda m, x: F.dropout(x, 0.5, False, False),
    "leaky_relu_without_in_place": lambda m, x: F.leaky_relu(x, 1),
    "custom_op_that_writes_nothing": lambda m, x: torch.ops.rir_tests.doubled(x),
    "something_else_in_a_child": lambda m, x: m.zero(m.first(x)),
    "own_result_in_a_sequential": lambda m, x: m.fresh(x),
}


def something_else_in_place(m, x):
    y = m.bn(m.conv(x))
    s = x * 2
    s += 1
    return F.relu(y + s.relu_())


def residual_before_it_is_added(m, x):
    y = m.bn(m.conv(m.first(x)))
    x.mul_(2)
    return F.relu(y + x)


def statistics_set_before(m, x):
    y = m.conv(x)
    m.bn.running_var.fill_(1)
    return F.relu(m.bn(y))


UNNOTICED = (something_else_in_place, residual_before_it_is_added, statistics_set_before)


def kinds(forwards, between, residuals):
    """{name: class} of whole forwards, and of operations within the forwards of Between and Residual."""
    named = [(Between, "operation", between), (Residual, "operation", residuals)]
    named.append((Net, "forward", {function.__name__: function for function in forwards}))
    return {n: type(n, (base,), {method: f}) for base, method, functions in named for n, f in functions.items()}


def forward(model, training):
    """Output, the input afterwards, and buffers."""
    x = X.clone()
    with torch.no_grad():
        y = model.train(training)(x)
    return {"output": y, "input": x, **model.state_dict()}


def check(kind, operations):
    """Compares the fused with the unfused model; returns the reasons why the model itself is skipped."""
    torch.manual_seed(0)
    original, options = settle(kind()), {"impl": "torch", "filter_fn": lambda module, name: not name}
    original.alike.running_mean = original.bn.running_mean
    fused, _ = pair_of(original, operations, **options)
    for training in (True, False):
        torch.testing.assert_close(forward(fused, training), forward(original, training), **CLOSE)
    return [item.reason for item in fuse_(original, dry_run=True, **options).skipped if not item.name]


noticed = kinds(NOTICED, BETWEEN_NOTICED, RESIDUAL_NOTICED)
unnoticed = kinds(UNNOTICED, {}, RESIDUAL_UNNOTICED)


@pytest.mark.parametrize("name", noticed)
def test_noticed(name):
    reasons = check(noticed[name], 0)
    assert any("between its parts" in reason or "statistics" in reason for reason in reasons), reasons


@pytest.mark.parametrize("name", unnoticed)
def test_unnoticed(name):
    assert check(unnoticed[name], 1) == []


def test_two_arguments_may_be_one_tensor():
    def forward(self, x, y):
        z = self.conv(x)
        y.mul_(2)
        return F.relu(self.bn(z) + 1)

    torch.manual_seed(0)
    fused, original = pair_of(settle(with_forward(forward)()).eval(), 0, impl="torch")
    assert "in place" in fuse_(original, dry_run=True).skipped[0].reason
    with torch.no_grad():
        found, expected = (model(x, x[:1]) for model, x in ((fused, X.clone()), (original, X.clone())))
    torch.testing.assert_close(found, expected, **CLOSE)
