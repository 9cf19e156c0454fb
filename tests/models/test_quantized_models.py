"""quantize_: which layers, at how many bits, signed or not; what is refused; and that the result learns."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rir_kernels as rir
from models.quantized import quantize_
from models.rir import RiR
from tests.support import quantized_helpers as oracle


def found(model):
    return {n: m.quantizer for n, m in model.named_modules() if hasattr(m, "quantizer")}


def test_quantize_keeps_parameters_and_keys():
    torch.manual_seed(0)
    model = RiR(width=(16, 32, 64), depth=(1, 1, 1), shortcut="projection", impl="torch")
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    keys, values = list(model.state_dict()), copy.deepcopy(model.state_dict())
    assert quantize_(model) is model
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    new = [key for key in model.state_dict() if key not in keys]
    assert {key.split(".quantizer.")[1] for key in new} == {"bound", "batches"} and len(new) == 2 * len(found(model))
    assert all(torch.equal(model.state_dict()[key], values[key]) for key in keys)
    assert model.stem.impl == model.stages[0][0].layers[0].impl == "torch"
    bits = {name: (q.weight_bits, q.activation_bits) for name, q in found(model).items()}
    assert bits.pop("stem") == bits.pop("head") == (8, 8)
    assert set(bits.values()) == {(4, 4)}
    assert {"stages.1.0.projection", "stages.1.0.layers.0.projection"} < set(bits)
    assert [name for name, q in found(model).items() if q.signed] == ["stem"]
    assert len(rir.fuse_(model).replaced) == 0


def test_before_a_bound_is_known_only_weights_are_quantized():
    torch.manual_seed(0)
    model = RiR(width=(16, 32, 64), depth=(1, 1, 0)).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    quantize_(model, None, 4, first_last_bits=None)
    assert torch.equal(model(x), expected) or torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)  # fp32 sums


class Residual(nn.Module):
    """A block by hand, with a projection beside it."""

    def __init__(self, activation="relu"):
        super().__init__()
        self.first = rir.ConvBNAct(4, 4, 3)
        self.second = rir.ConvBNAct(4, 4, 3, activation=activation)
        self.projection = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.second(self.first(x), residual=self.projection(x))


class Shifted(nn.Module):
    """Numbers after a ReLU that are changed once more: by `change`, whose result is used or not."""

    def __init__(self, change, use_result=True):
        super().__init__()
        self.change, self.use_result = change, use_result
        self.layer = rir.RiRLayer(4, 4)

    def forward(self, x):
        x = F.relu(x)
        changed = self.change(x)
        return self.layer(changed if self.use_result else x)


def block(**options):
    return rir.RiRBlock(4, 4, **options)


POST = {"outer_shortcut": "post_act"}
SIGNS = {
    "blocks without a stem": (lambda: [block(), block()], ["0.layers.0"]),
    "a negative input travels past post_act": (lambda: [block(**POST), block(**POST)], ["0.layers.0", "1.layers.0"]),
    "fraction 0 has nothing to add": (
        lambda: [block(**POST, residual_fraction=0.0), block(**POST, residual_fraction=0.0)], ["0.layers.0"],
    ),
    "fraction 1": (
        lambda: [block(**POST, residual_fraction=1.0), block(residual_fraction=1.0), block()],
        ["0.layers.0", "1.layers.0"],
    ),
    "fraction 0, both streams": (
        lambda: [block(**POST, residual_fraction=0.0, outer_streams="both"), block()], ["0.layers.0", "1.layers.0"],
    ),
    "a ReLU first": (lambda: [nn.ReLU(), block(**POST), nn.MaxPool2d(2), block()], []),
    "a projection after the ReLU": (
        lambda: [nn.ReLU(), block(**POST, shortcut="projection", stride=2), block()], ["2.layers.0"],
    ),
    "a projection before the norm": (
        lambda: [nn.ReLU(), block(shortcut="projection", stride=2), block()], [],
    ),
    "projections read what their layer reads": (
        lambda: [block(shortcut="projection", stride=2)], ["0.layers.0", "0.layers.0.projection", "0.projection"],
    ),
    "no activation": (lambda: [rir.ConvBNAct(4, 4, 3, activation=None), rir.RiRLayer(4, 4), block()], ["0", "1"]),
    "a head": (
        lambda: [block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2)],
        ["0.layers.0"],
    ),
    "scaled up": (lambda: [Shifted(lambda x: 2 * x + 1 + x)], []),
    "scaled by a negative number": (lambda: [Shifted(lambda x: x * -1.0)], ["0.layer"]),
    "less": (lambda: [Shifted(lambda x: torch.add(x, x, alpha=-2))], ["0.layer"]),
    "nobody knows": (lambda: [Shifted(lambda x: x - 1)], ["0.layer"]),
    "in place": (lambda: [Shifted(lambda x: x.sub_(1), use_result=False)], ["0.layer"]),
    "by hand": (lambda: [nn.ReLU(), Residual(), Residual(None), block()], ["3.layers.0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNS)
def test_signs(name):
    """Which inputs are signed, and that an input that was negative is nowhere unsigned."""
    make, signed = SIGNS[name]
    torch.manual_seed(0)
    model = quantize_(nn.Sequential(*make()))
    assert [name for name, q in found(model).items() if q.signed] == signed

    def look(quantizer, args):
        assert quantizer.signed or args[0].min() >= 0

    for q in found(model).values():
        q.register_forward_pre_hook(look)
    model(torch.randn(4, 4, 8, 8))


def test_a_layer_alone_and_a_shared_one():
    assert quantize_(rir.RiRLayer(4, 4)).quantizer.signed
    assert quantize_(rir.ConvBNAct(3, 4, 3)).quantizer.weight_bits == 8
    shared = rir.RiRLayer(4, 4)
    model = quantize_(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0].quantizer.signed and model[0] is model[2]


def test_first_and_last_are_those_of_the_calls():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.first = (rir.ConvBNAct(4, 4, 3) for _ in range(3))

        def forward(self, x):
            return self.last(self.middle(self.first(x)))

    bits = {name: q.weight_bits for name, q in found(quantize_(Backwards(), 3, 5)).items()}
    assert bits == {"last": 8, "middle": 3, "first": 8}
    model = quantize_(nn.Sequential(*(block(shortcut="projection", stride=2) for _ in range(2))))
    assert {n: q.weight_bits for n, q in found(model).items()} == {
        "0.layers.0": 8, "0.layers.0.projection": 8, "0.layers.1": 4, "0.projection": 8,
        "1.layers.0": 4, "1.layers.0.projection": 4, "1.layers.1": 8, "1.projection": 4,
    }  # fmt: skip


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = rir.ConvBNAct(3, 3, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


REFUSED = {
    "nothing to quantize": (lambda: nn.Sequential(nn.ReLU()), {}),
    "quantized already": (lambda: quantize_(block()), {}),
    "fused: call rir_kernels.unfuse_": (
        lambda: rir.fuse_(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())).model, {},
    ),
    "cannot be traced": (Untraceable, {}),
    "padding must be zeros": (lambda: nn.Sequential(block(), nn.Conv2d(4, 4, 3, padding="same")), {}),
    "weight_bits must be an int from 2 to 8": (block, {"weight_bits": 9}),
    "activation_bits must be": (block, {"activation_bits": 1}),
    "first_last_bits must be": (block, {"first_last_bits": True}),
    "start_step must be": (block, {"start_step": -1}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_change_nothing(message):
    make, options = REFUSED[message]
    model = make()
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        quantize_(model, **options)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_equal_and_independent(duplicate):
    model = oracle.thin_network(depth=(1, 1, 0))
    x = torch.randn(2, 3, 8, 8)
    twin, expected = duplicate(model), model(x)
    assert torch.equal(twin(x), expected)
    twin.train()(10 * x)
    assert torch.equal(model(x), expected)


def test_checkpoints_load():
    model = oracle.thin_network(depth=(1, 1, 0))
    twin = quantize_(RiR(width=(16, 32, 64), depth=(1, 1, 0))).eval()
    x = torch.randn(2, 3, 8, 8)
    twin(x)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.images[order], dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(data.target[order])
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def accuracy_after_training(model, train, test, epochs=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - epoch / epochs)
        for x, y in zip(train[0].split(100), train[1].split(100), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        return (model.eval()(test[0]).argmax(1) == test[1]).float().mean().item()


def test_digits_are_learnt_at_4_bits():
    train, test = digits()
    torch.manual_seed(0)
    model = RiR(width=(8, 16, 32), depth=(1, 1, 1), in_channels=1)
    quantized = quantize_(copy.deepcopy(model), start_step=14)
    reached = accuracy_after_training(model, train, test)
    at_4_bits = accuracy_after_training(quantized, train, test)
    print(f"digits: float {reached:.3f}, W4A4 {at_4_bits:.3f}")
    # 397 images: one standard deviation of an accuracy near 0.97 is 0.9 points, and chance is 10 %
    assert reached > 0.93
    assert at_4_bits > reached - 0.04
