"""Training of fused models beside unfused ones: many steps, frozen parts, accumulation, checkpointing, averages."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import rir_kernels as rir
from tests.pytorch.networks import BLOCKS, OPERATIONS, BasicBlock, Bottleneck, images, resnet_twins
from tests.support.surgery_helpers import CLOSE, assert_same, fused_calls, randn, settle

STEPS = 20


def assert_close_state(ours, theirs, **tolerance):
    for name, expected in theirs.state_dict().items():
        found = ours.state_dict()[name]
        torch.testing.assert_close(found, expected, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def train(model, make_images, steps=STEPS, during=lambda model, i: None):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    for i in range(steps):
        during(model, i)
        optimizer.zero_grad()
        y = model(make_images(i))
        target = torch.arange(len(y)) % y.shape[1]
        nn.functional.cross_entropy(y.flatten(2).mean(2) if y.dim() > 2 else y, target).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_twenty_steps_in_fp64(block):
    """Rounding, 1e-16 a step, grows with training: 1e-9 leaves it seven orders, and a mistake is above 1e-3."""
    fused, original = resnet_twins(block)
    for model in (fused, original):
        train(model, lambda i: images(seed=i))
    assert_close_state(fused, original, rtol=1e-9, atol=1e-9)


def test_twenty_steps_in_fp32():
    """The difference to fp64 is what fp32 costs by itself; ours may be twice that, and a hundred roundings.

    On a CPU both run ATen's convolutions and norms, but with other sums in between; what one step rounds the next ones
    amplify, in either model alike, so no fixed tolerance would tell a fault from rounding.
    """
    fused, original = resnet_twins()
    golden = train(copy.deepcopy(original), lambda i: images(seed=i, dtype=torch.float32).double())
    for model in (fused.float(), original.float()):
        train(model, lambda i: images(seed=i, dtype=torch.float32))
    for name, exact in golden.state_dict().items():
        ours, torchs = (model.state_dict()[name].double() for model in (fused, original))
        scale = exact.abs().max()
        budget = 2 * (torchs - exact).abs().max() + 100 * torch.finfo(torch.float32).eps * scale
        assert (ours - exact).abs().max() <= budget, name


@pytest.mark.parametrize("name", ["RiRUnit", "PreResUnit"])
def test_blocks_of_pytorchcv(name):
    original = settle(BLOCKS[name]())
    fused = copy.deepcopy(original)
    rir.fuse_(fused)
    for model in (fused, original):
        train(model, lambda i: randn(4, 4, 4, 4, seed=i), steps=5)
    assert_close_state(fused, original, rtol=1e-9, atol=1e-9)


def freeze(model, i):
    if i == 2:  # a backbone's stem, and its norms' statistics, as in fine-tuning
        model.conv1.requires_grad_(False), model.bn1.requires_grad_(False), model.layer1.requires_grad_(False)
        model.bn1.eval(), model.layer1.eval()
    if i == 4:
        model.layer1[0].conv2.requires_grad_(True)
        model.bn1.train()


def test_freezing_on_the_way():
    fused, original = resnet_twins()
    before = copy.deepcopy(original)
    with fused_calls(6 * OPERATIONS):
        train(fused, lambda i: images(seed=i), 6, freeze)
    train(original, lambda i: images(seed=i), 6, freeze)
    assert_close_state(fused, original, rtol=1e-9, atol=1e-9)
    assert fused.bn1.num_batches_tracked == 4 and fused.layer1[0].bn2.num_batches_tracked == 2
    assert not torch.equal(fused.layer1[0].conv2.weight, before.layer1[0].conv2.weight)


def test_nothing_to_train():
    fused, original = resnet_twins()
    for model in (fused, original):
        model.requires_grad_(False)
        assert not model(images()).requires_grad
    assert_close_state(fused, original, **CLOSE)


def test_accumulated_gradients():
    fused, original = resnet_twins()
    for model in (fused, original):
        for i in range(3):
            model(images(seed=i)).square().mean().backward()
    for ours, theirs in zip(fused.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)


def checkpointed_step(model, x, **options):
    """The gradients, with each child checkpointed: a region ends with a norm and a ReLU."""
    leaf, y = x.clone().requires_grad_(), None
    for part in model:
        y = checkpoint(part, leaf if y is None else y, **options)
    y.square().sum().backward()
    return [leaf.grad, *(p.grad for p in model.parameters())]


def regions():
    torch.manual_seed(0)
    model = settle(nn.Sequential(*(BasicBlock(4, 4) for _ in range(2)), rir.RiRBlock(4, 4), rir.ConvBNAct(4, 4, 3)))
    fused = copy.deepcopy(model)
    for part in fused:
        rir.fuse_(part)
    return fused, model


def test_checkpointing_that_stops_early():
    """The second forward ends with the last tensor that backward needs: what ends a region counts once."""
    fused, _ = regions()
    checkpointed_step(fused, randn(2, 4, 6, 6), use_reentrant=False)
    counts = {name: int(b) for name, b in fused.named_buffers() if name.endswith("tracked")}
    last = {"0.bn2", "1.bn2", "2.layers.1.bn", "3.bn"}
    assert counts == {name: 1 if name.removesuffix(".num_batches_tracked") in last else 2 for name in counts}


def test_exponential_average():
    averages = []
    for model in resnet_twins():
        averages.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True))
        train(model, lambda i: images(seed=i), 3, lambda model, _i: averages[-1].update_parameters(model))
    assert_same(averages[0].module, averages[1].module, images(), calls=OPERATIONS)


def test_statistics_made_anew_for_an_average():
    """update_bn sets momentum=None: the cumulative average over its batches."""
    models = resnet_twins()
    for model in models:
        torch.optim.swa_utils.update_bn([images(seed=i) for i in range(3)], model)
    assert_close_state(*models, **CLOSE)
