"""fuse_ moves the parts of a unit to its last one; refused where what stands in between would notice, and only there.

The tolerance is surgery_helpers'.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from rir_kernels.surgery import fuse_
from tests.support.surgery_helpers import CLOSE, X, settle


def _halve(scale, x):
    x.mul_(scale)


OPS = torch.library.Library("rir_tests", "FRAGMENT")
OPS.define("halved_(float scale, Tensor(a!) x) -> ()")
OPS.define("doubled(Tensor x) -> Tensor")
OPS.impl("halved_", _halve, "CPU")
OPS.impl("doubled", lambda x: 2 * x, "CPU")


class Zero(nn.Module):
    """Writes to what it is given."""

    def forward(self, v):
        v.mul_(0)
        return v


class Same(nn.Module):
    """Returns a view of what it is given, and its class does not say so."""

    def forward(self, v):
        return v[:]


class Around(nn.Module):
    """A forward that is not looked into."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def forward(self, v):
        for module in self.inner:
            v = module(v)
        return v


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.conv, self.bn, self.first = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.zero, self.same, self.relu = Zero(), Same(), nn.ReLU(inplace=True)
        self.nothing, self.fresh, self.drop = nn.Identity(), nn.Sequential(nn.Conv2d(4, 4, 1), self.relu), nn.Dropout()
        self.flat = nn.Sequential(nn.Identity(), self.relu)
        self.around = Around(nn.Conv2d(4, 4, 1), self.bn)
        self.alike, self.hooked = nn.BatchNorm2d(4, momentum=0.5), nn.Conv2d(4, 4, 1)
        self.hooked.register_forward_pre_hook(lambda _module, inputs: (inputs[0].mul_(2),))

    def forward(self, x):
        return self.function(self, x)


def view_by_index(m, x):
    y = m.conv(x)
    m.zero(x[:, :2])
    return F.relu(m.bn(y))


def view_by_method(m, x):
    y = m.conv(x)
    x.flatten(1).mul_(2)
    return F.relu(m.bn(y))


def view_by_attribute(m, x):
    y = m.conv(x)
    x.data.add_(1)
    return F.relu(m.bn(y))


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


def in_place_child(m, x):
    y = m.conv(x)
    m.relu(x.view(-1))
    return F.relu(m.bn(y))


def hooked_child(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y + m.hooked(x))


def in_place_sequential(m, x):
    y = m.conv(x)
    m.flat(x)
    return F.relu(m.bn(y))


def custom_op(m, x):
    y = m.conv(x)
    torch.ops.rir_tests.halved_(0.5, x)
    return F.relu(m.bn(y))


def custom_overload(m, x):
    y = m.conv(x)
    torch.ops.rir_tests.halved_.default(0.5, x=x[0])
    return F.relu(m.bn(y))


@fx.wrap
def zero(v):
    return v.mul_(0)


def wrapped_function(m, x):
    y = m.conv(x)
    zero(x[:1])
    return F.relu(m.bn(y))


def out(m, x):
    y = m.conv(x)
    torch.mul(x, 2, out=x)
    return F.relu(m.bn(y))


def function_in_place(m, x):
    y = m.conv(x)
    F.leaky_relu(x, 0.1, True)
    return F.relu(m.bn(y))


def weight(m, x):
    y = m.conv(x)
    m.conv.weight.data.mul_(2)
    return F.relu(m.bn(y) + m.conv(x))


def read_statistics(m, x):
    y = m.bn(m.conv(x))
    s = m.bn.running_mean * 1
    return F.relu(y + x) * s.view(1, -1, 1, 1)


def other_names_of_the_norm(m, x):
    return F.relu(m.bn(m.conv(x)) + m.around(m.first(x)))


def tied_statistics(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y + m.alike(x))


def functional_norm(m, x):
    y = m.bn(m.conv(x))
    s = F.batch_norm(x, m.bn.running_mean, m.bn.running_var, training=m.bn.track_running_stats)
    return F.relu(y + s)


def statistics_as_residual(m, x):
    s = m.bn.running_mean.view(1, -1, 1, 1).expand(2, 4, 6, 6)
    return F.relu(m.bn(m.conv(x)) + s)


NOTICED = [
    view_by_index, view_by_method, view_by_attribute, view_by_unknown_child, view_by_known_child, view_by_list,
    two_views, of_the_residual, in_place_child, hooked_child, in_place_sequential, custom_op,
    custom_overload, wrapped_function, out,
    function_in_place, weight, read_statistics, other_names_of_the_norm, tied_statistics, functional_norm,
    statistics_as_residual,
]  # fmt: skip


def cat_along_1(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y + torch.cat((x[:, :2], x[:, :2] * 0), 1))


def pool_between(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y + F.avg_pool2d(x, 3, 1, 1))


def softmax_along_1(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y + F.softmax(x, 1))


def dropout_without_in_place(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y + F.dropout(x, 0.5, False, False))


def leaky_relu_without_in_place(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y + F.leaky_relu(x, 1))


def custom_op_that_writes_nothing(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y + torch.ops.rir_tests.doubled(x))


def something_else_in_place(m, x):
    y = m.bn(m.conv(x))
    s = x * 2
    s += 1
    return F.relu(y + s.relu_())


def something_else_in_a_child(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y + m.zero(m.first(x)))


def own_result_in_a_sequential(m, x):
    y = m.bn(m.conv(x))
    return F.relu(y + m.fresh(x))


def residual_before_it_is_added(m, x):
    y = m.bn(m.conv(m.first(x)))
    x.mul_(2)
    return F.relu(y + x)


def statistics_set_before(m, x):
    y = m.conv(x)
    m.bn.running_var.fill_(1)
    return F.relu(m.bn(y))


UNNOTICED = [
    cat_along_1, pool_between, softmax_along_1, dropout_without_in_place, leaky_relu_without_in_place,
    custom_op_that_writes_nothing, something_else_in_place, something_else_in_a_child, own_result_in_a_sequential,
    residual_before_it_is_added, statistics_set_before,
]  # fmt: skip


def forward(model, training):
    """Output, input afterwards, and buffers."""
    x = X.clone()
    with torch.no_grad():
        y = model.train(training)(x)
    return {"output": y, "input": x, **model.state_dict()}


def check(function, fused_operations):
    original = settle(Net(function))
    original.alike.running_mean = original.bn.running_mean
    fused = copy.deepcopy(original)
    report = fuse_(fused, impl="torch", filter_fn=lambda module, name: not name)
    assert len(report.replaced) == fused_operations, report
    for training in (True, False):
        found, expected = forward(fused, training), forward(original, training)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
    return [item.reason for item in report.skipped if not item.name]


@pytest.mark.parametrize("function", NOTICED, ids=lambda f: f.__name__)
def test_noticed(function):
    reasons = check(function, 0)
    assert any("between its parts" in reason or "statistics" in reason for reason in reasons), reasons


@pytest.mark.parametrize("function", UNNOTICED, ids=lambda f: f.__name__)
def test_unnoticed(function):
    assert check(function, 1) == []


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, y):
        z = self.conv(x)
        y.mul_(2)
        return F.relu(self.bn(z) + 1)


def test_two_arguments_may_be_one_tensor():
    torch.manual_seed(0)
    original = settle(Two()).eval()
    fused = copy.deepcopy(original)
    report = fuse_(fused, impl="torch")
    assert not report.replaced and "in place" in report.skipped[0].reason
    with torch.no_grad():
        found, expected = (model(x, x[:1]) for model, x in ((fused, X.clone()), (original, X.clone())))
    torch.testing.assert_close(found, expected, **CLOSE)
