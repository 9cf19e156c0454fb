"""Augmentation: every batch against one image at a time, and what the plans draw."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import affine_transform  # scikit-learn, which brings the digits, needs SciPy

from models.data import augment  # not its test_batches: pytest would take that for a test
from rir_kernels.common.memory_format import is_channels_last

COUNT, PADDING = 1000, 2


def plan(seed=0, epoch=0, count=COUNT, padding=PADDING, flip=True):
    return augment.plan_epoch(count, seed=seed, epoch=epoch, padding=padding, flip=flip)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    # no zeros, so that padding shows; higher than wide, so that mixed-up sides show
    x = torch.randint(1, 256, (COUNT, 3, 7, 5), generator=generator, dtype=torch.uint8)
    return x, torch.arange(COUNT)


def one_by_one(x, plan, start, stop, padding):
    """Each image padded, sliced and flipped by itself."""
    found = []
    for place in range(start, min(stop, len(plan.order))):
        top, left = plan.top[place].item(), plan.left[place].item()
        image = F.pad(x[plan.order[place]], (padding,) * 4)
        image = image[:, top : top + x.shape[2], left : left + x.shape[3]]
        found.append(image.flip(-1) if plan.mirror[place] else image)
    return torch.stack(found)


@pytest.mark.parametrize(("start", "stop"), [(0, 128), (900, 1100), (17, 18)])
@pytest.mark.parametrize("padding", [0, PADDING, 6])  # 6: crops beyond the image
@pytest.mark.parametrize("flip", [False, True])
def test_batch(images, start, stop, padding, flip):
    x, y = images
    before = x.clone()
    now = plan(padding=padding, flip=flip)
    found, labels = augment.batch(x, y, now, start, stop, padding=padding)
    assert found.dtype == torch.uint8
    assert torch.equal(found, one_by_one(x, now, start, stop, padding))
    assert torch.equal(labels, now.order[start:stop])
    assert torch.equal(x, before)


def test_grey_images(images):
    x, y = images[0][:, :1], images[1]
    found, _ = augment.batch(x, y, plan(), 0, 50, padding=PADDING)
    assert torch.equal(found, one_by_one(x, plan(), 0, 50, PADDING))


def test_nothing_but_the_order(images):
    x, y = images
    now = plan(padding=0, flip=False)
    found, _ = augment.batch(x, y, now, 0, COUNT, padding=0)
    assert torch.equal(found, x[now.order])


JITTER = augment.Jitter(shift=0.5, turn=10, zoom=0.1)


def test_motion(images):
    """Against SciPy's interpolation, which takes a matrix in (row, column) and counts from the first pixel."""
    x, y = images
    now = augment.plan_epoch(COUNT, seed=0, epoch=0, padding=PADDING, flip=True, jitter=JITTER)
    found, labels = augment.batch(x, y, now, 100, 200, padding=PADDING)
    assert found.dtype == torch.uint8
    assert torch.equal(labels, now.order[100:200])
    still = one_by_one(x, now, 100, 200, PADDING).double().numpy()
    middle = (np.array(x.shape[2:]) - 1) / 2
    for each, image, motion in zip(found, still, now.motion[100:200].double().numpy(), strict=True):
        matrix = motion[::-1, 1::-1]
        offset = middle - matrix @ middle + motion[::-1, 2]
        for plane, pixels in zip(each, image, strict=True):
            exact = affine_transform(pixels, matrix, offset, order=1, mode="grid-constant")
            assert np.abs(plane.numpy() - exact).max() <= 0.5 + 1e-3  # rounded, from fp32


def test_motions_are_within_their_limits():
    now = augment.plan_epoch(COUNT, seed=0, epoch=0, padding=PADDING, flip=True, jitter=JITTER)
    (a, b, x), (c, d, y) = now.motion.double().permute(1, 2, 0)
    assert torch.equal(a, d)
    assert torch.equal(b, -c)
    found = {"shift": (x, 0.5), "shift down": (y, 0.5), "turn": (torch.atan2(c, a).rad2deg(), 10)}
    found["zoom"] = (a.hypot(c) - 1, 0.1)
    for name, (drawn, limit) in found.items():
        assert drawn.abs().max() <= limit * (1 + 1e-5), name
        assert drawn.min() < -0.97 * limit, name  # 1,000 are all above that with a chance of 3e-7
        assert drawn.max() > 0.97 * limit, name
    drawn = torch.stack([each for each, _ in found.values()])
    assert (drawn.corrcoef() - torch.eye(4)).abs().max() < 0.16  # independent: five standard deviations
    plain = plan()
    assert plain.motion is None
    assert all(torch.equal(getattr(now, name), getattr(plain, name)) for name in ("order", "top", "left", "mirror"))


@pytest.mark.gpu
@pytest.mark.real_gpu("torch's own operators")
def test_motion_on_a_gpu(images):
    x, y = images
    now = augment.plan_epoch(COUNT, seed=0, epoch=0, padding=PADDING, flip=True, jitter=JITTER)
    expected, _ = augment.batch(x, y, now, 0, 500, padding=PADDING)
    x, y, now = x.cuda(), y.cuda(), now.to("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, _ = augment.batch(x, y, now, 0, 500, padding=PADDING)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (found.cpu().int() - expected.int()).abs().max() <= 1  # a half may be rounded either way


@pytest.mark.gpu
@pytest.mark.real_gpu("the driver's word that the host waits")
def test_batch_on_a_gpu_waits_for_nothing(images):
    x, y = images
    expected = augment.batch(x, y, plan(), 0, 500, padding=PADDING)
    x, y, now = x.cuda(), y.cuda(), plan().to("cuda")
    mean, std = torch.full((2, 3), 100.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment.batch(x, y, now, 0, 500, padding=PADDING)
        augment.normalise(found[0], mean, std)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_plan():
    now = plan()
    assert torch.equal(now.order.sort().values, torch.arange(COUNT))
    for shift in (now.top, now.left):
        assert shift.dtype == torch.long
        counts = shift.bincount()
        assert len(counts) == 2 * PADDING + 1
        assert counts.min() > COUNT / 5 * 0.7  # four standard deviations below what is expected is 0.75
    assert not torch.equal(now.top, now.left)
    assert now.mirror.dtype == torch.bool
    assert 400 < now.mirror.sum() < 600  # six standard deviations
    assert not plan(flip=False).mirror.any()
    assert not plan(padding=0).top.any()


def test_plan_is_a_function_of_its_arguments():
    first = plan(seed=3, epoch=4)
    torch.manual_seed(1)
    torch.rand(5)
    for name in ("order", "top", "left", "mirror"):
        assert torch.equal(getattr(first, name), getattr(plan(seed=3, epoch=4), name))
        moved = first.to("meta")
        assert getattr(moved, name).device.type == "meta"


def test_epochs_and_seeds_differ():
    orders = {tuple(plan(seed, epoch).order.tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25  # so seed 0's second epoch is not seed 1's first
    assert torch.equal(plan(flip=True).order, plan(flip=False).order)  # what is switched off changes nothing else


@pytest.mark.parametrize(("name", "value"), [("count", 0), ("seed", -1), ("epoch", -1), ("padding", -1)])
def test_plans_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least {value + 1}, got {value}"):
        plan(**{name: value})


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalise(images, dtype, channels):
    x = images[0][:, :channels].contiguous()
    mean, std = torch.tensor([[10.0, 100.0, 120.5], [3.0, 60.0, 70.25]], dtype=torch.float64)[:, :channels]
    found = augment.normalise(x, mean, std, dtype=dtype)
    exact = (x.double() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    assert found.dtype == dtype
    assert is_channels_last(found)  # a grey image too: its strides are what the network goes by
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_normalise_what_never_varies():
    x = torch.full((2, 1, 3, 3), 7, dtype=torch.uint8)
    assert not augment.normalise(x, torch.tensor([7.0]), torch.tensor([0.0])).any()


def test_batches_for_testing(images):
    x, y = images
    pairs = list(augment.test_batches(x, y, 300))
    assert [len(labels) for _, labels in pairs] == [300, 300, 300, 100]
    assert torch.equal(torch.cat([images for images, _ in pairs]), x)
    assert torch.equal(torch.cat([labels for _, labels in pairs]), y)
    with pytest.raises(ValueError, match="size=0"):
        augment.test_batches(x, y, 0)
