"""torch.func over fused models: other weights, gradients by sample, ensembles; tolerance as in surgery_helpers."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import rir_kernels as rir
from tests.pytorch.networks import OPERATIONS, ResNet, images, resnet_twins
from tests.support.emulation import gpu
from tests.support.surgery_helpers import CLOSE, fused_calls, settle


def without_statistics():
    """vmap refuses to update buffers that all samples share, in nn.BatchNorm2d as here: norms that have none."""
    models = resnet_twins()
    for model in models:
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
                norm.num_batches_tracked = None
    return models


def values(model):
    return {name: 1.5 * p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_functional_call(training):
    fused, original = (model.train(training) for model in resnet_twins())
    state = values(fused) | {name: b.clone() for name, b in fused.named_buffers()}
    before, states = copy.deepcopy(fused.state_dict()), [copy.deepcopy(state) for _ in range(2)]
    with fused_calls(OPERATIONS):
        found = functional_call(fused, states[0], (images(),))
    torch.testing.assert_close(found, functional_call(original, states[1], (images(),)), **CLOSE)
    for name, expected in states[1].items():  # the buffers handed in are updated, those of the model are not
        torch.testing.assert_close(states[0][name], expected, **CLOSE)
    for name, expected in before.items():
        assert torch.equal(fused.state_dict()[name], expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_by_sample(training):
    fused, original = without_statistics() if training else (model.eval() for model in resnet_twins())
    x = images(3)

    def by_sample(model):
        def loss(state, sample):
            return functional_call(model, state, (sample[None],)).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(values(model), x)

    with fused_calls(OPERATIONS):
        found = by_sample(fused)
    for name, expected in by_sample(original).items():
        torch.testing.assert_close(found[name], expected, **CLOSE)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_ensemble(training):
    torch.manual_seed(1)
    originals = [settle(ResNet()).train(training) for _ in range(3)]
    with torch.no_grad():
        for i, model in enumerate(originals):
            model.conv1.weight.mul_(i + 1), model.fc.weight.mul_(i + 1)
    fused = [copy.deepcopy(model) for model in originals]
    for model in fused:
        rir.fuse_(model)
    parameters, buffers = stack_module_state(fused)
    base, x = copy.deepcopy(fused[0]).to("meta"), images()

    def call(parameters, buffers):
        return functional_call(base, (parameters, buffers), (x,))

    with fused_calls(OPERATIONS):
        found = vmap(call)(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([model(x) for model in originals]), **CLOSE)
    for name, buffer in buffers.items():  # each member's own, updated in place
        expected = torch.stack([model.get_buffer(name) for model in originals])
        torch.testing.assert_close(buffer, expected, **CLOSE)


def test_shared_statistics_cannot_be_updated_by_samples():
    """torch's own error, as without fuse_."""
    for model in resnet_twins():
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="running_mean or running_var, which will be updated in place"):
            vmap(lambda sample, model=model: model(sample[None]))(images())
        assert torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def test_forward_mode():
    fused, original = (model.eval() for model in resnet_twins())
    x, tangent = images(), images(seed=1)
    with fused_calls(OPERATIONS):
        found = jvp(fused, (x,), (tangent,))
    torch.testing.assert_close(found, jvp(original, (x,), (tangent,)), **CLOSE)


TRANSFORMS = {
    "vmap": lambda unit, x: vmap(unit)(torch.stack([x, 2 * x])),
    "grad": lambda unit, x: grad(lambda x: unit(x).square().sum())(x),
    "jvp": lambda unit, x: jvp(unit, (x,), (2 * x,))[1],
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_auto_leaves_transforms_to_torch(kind):
    unit = rir.ConvBNAct(3, 4, 3, device=gpu()).eval()
    x = images(dtype=torch.float32).to(gpu())
    found = TRANSFORMS[kind](unit, x)
    unit.impl = "torch"
    torch.testing.assert_close(found, TRANSFORMS[kind](unit, x), rtol=1e-4, atol=1e-4)  # sums of 27 in TF32 or fp32
