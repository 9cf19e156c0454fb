"""forward(r, t): two streams as one tensor, copied only where they do not lie side by side."""

import pytest
import torch

import rir_kernels as rir
from rir_kernels import functional
from rir_kernels.joining import join

LAST = torch.channels_last
N, C, H, W = 2, 4, 5, 3


def buffer(channels=2 * C, memory_format=torch.contiguous_format):
    values = torch.randn(N, channels, H, W, generator=torch.Generator().manual_seed(0))
    return values.contiguous(memory_format=memory_format)


def halves(x):
    return x[:, :C], x[:, C:]


def one_image(x):
    return x[:1, :C], x[:1, C:]


ADJACENT = {
    "contiguous": lambda: halves(buffer()),
    "channels_last": lambda: halves(buffer(memory_format=LAST)),
    "within a larger one": lambda: halves(buffer(3 * C)[:, 2 : 2 + 2 * C]),
    "of other widths": lambda: buffer().split([1, 2 * C - 1], dim=1),
    "one image": lambda: one_image(buffer()),
    "images of one buffer": lambda: buffer(C).split(1),
    "transposed": lambda: halves(buffer().transpose(2, 3)),
    "detached": lambda: tuple(s.detach() for s in halves(buffer())),
}
APART = {
    "two buffers": lambda: (buffer(C), buffer(C)),
    "swapped": lambda: halves(buffer())[::-1],
    "a gap between": lambda: buffer(3 * C).split(C, 1)[::2],
    "overlapping": lambda: (lambda x: (x[:, :C], x[:, 1 : 1 + C]))(buffer()),
    "the same": lambda: (lambda x: (x[:, :C], x[:, :C]))(buffer()),
    "other strides": lambda: (lambda x: (x[:, :C], x[:, C:].contiguous(memory_format=LAST)))(buffer()),
    "transposed, behind it": lambda: (lambda x: (x[:1], x[1:].mT))(torch.randn(2, C, 3, 3)),
    "the same place in two buffers": lambda: (buffer()[:, :C], buffer()[:, C:]),
    "other formats": lambda: (buffer(C), buffer(C, LAST)),
}


def join_and_see(r, t):
    """[r | t], and whether it is a view."""
    x = join(r, t)
    assert torch.equal(x, torch.cat([r, t], dim=1))
    return x, x.untyped_storage().data_ptr() == r.untyped_storage().data_ptr()


@pytest.mark.parametrize("make", ADJACENT.values(), ids=ADJACENT.keys())
def test_side_by_side_is_a_view(make):
    r, t = make()
    x, is_view = join_and_see(r, t)
    assert is_view and x.data_ptr() == r.data_ptr()


@pytest.mark.parametrize("make", APART.values(), ids=APART.keys())
def test_apart_is_a_copy(make):
    assert not join_and_see(*make())[1]


def test_expanded_streams():
    """Stride 0 along the channels: both streams are the same memory, and a view of it is right."""
    r = buffer(1).expand(-1, C, -1, -1)
    join_and_see(r, r)
    join_and_see(r, buffer(1).expand(-1, C, -1, -1))
    join_and_see(*halves(torch.randn(1, 2 * C, H, W).expand(N, -1, -1, -1)))


@pytest.mark.parametrize("empty", [(0, 0), (0, C), (C, 0)])
def test_a_stream_without_channels(empty):
    r, t = (buffer(width) if width else buffer()[:, :0] for width in empty)
    assert join(r, t) is (t if r.shape[1] == 0 else r)


def test_an_empty_batch():
    assert join(*halves(buffer()[:0])).shape == (0, 2 * C, H, W)
    assert join(buffer()[:0, :C], torch.zeros(0, C, H, W)).shape == (0, 2 * C, H, W)


@pytest.mark.parametrize("layer", [rir.RiRLayer(2 * C, 6), rir.RiRBlock(2 * C, 6, stride=2, outer_streams="both")])
@pytest.mark.parametrize("make", [ADJACENT["contiguous"], ADJACENT["channels_last"], APART["two buffers"]])
def test_pair_is_packed(layer, make, monkeypatch):
    """The same bits, one buffer, gradients of both; where the streams are adjacent the operation reads that buffer."""
    apply, read = functional.apply, []
    monkeypatch.setattr(functional, "apply", lambda x, *a, **k: read.append(x.data_ptr()) or apply(x, *a, **k))

    r, t = (s.detach().requires_grad_() for s in make())
    # packed in the same memory format: another one may sum in another order
    x = torch.cat([r, t], dim=1).detach().requires_grad_()
    new_r, new_t = layer(r, t)
    assert (read[0] == r.data_ptr()) == (make is not APART["two buffers"])
    y = layer(x)

    assert (new_r.shape[1], new_t.shape[1]) == (3, 3)
    assert torch.equal(torch.cat([new_r, new_t], dim=1), y)
    assert join_and_see(new_r.detach(), new_t.detach())[1]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    torch.autograd.backward((new_r, new_t), (dy[:, :3], dy[:, 3:]))
    assert torch.equal(torch.cat([r.grad, t.grad], dim=1), x.grad)


def test_the_buffer_plays_no_part_in_the_gradients():
    base = buffer().requires_grad_()
    r, t = (s.detach().requires_grad_() for s in halves(base))
    sum(s.sum() for s in rir.RiRLayer(2 * C, 6)(r, t)).backward()
    assert base.grad is None
    assert r.grad.shape == r.shape and t.grad.shape == t.shape

    r, t = halves(base)[0].detach(), halves(base)[1].detach().requires_grad_()
    sum(s.sum() for s in rir.RiRLayer(2 * C, 6)(r, t)).backward()
    assert r.grad is None and t.grad is not None


def test_gradcheck_twice():
    x = buffer().double()[:1, :, :3, :2].clone()
    r, t = (s.detach().requires_grad_() for s in halves(x))
    assert join_and_see(r, t)[1]

    def function(r, t):
        return join(r, t).square()

    assert torch.autograd.gradcheck(function, (r, t))
    assert torch.autograd.gradgradcheck(function, (r, t))
