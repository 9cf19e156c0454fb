"""forward(r, t): two streams as one tensor and back, copied only where they do not lie side by side."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rir_kernels as rir
from rir_kernels.common.memory_format import is_channels_last
from rir_kernels.common.stream_views import join, split
from rir_kernels.dispatch import operation

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
    apply, read = operation.apply, []
    monkeypatch.setattr(
        operation, "apply", lambda call, *a, **k: read.append(call.x.data_ptr()) or apply(call, *a, **k)
    )

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


@pytest.mark.parametrize("channels", [3, 0, 2 * C])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_split_is_two_views(channels, requires_grad):
    x = buffer(memory_format=LAST).requires_grad_(requires_grad)
    for ours, expected in zip(split(x, channels), (x[:, :channels], x[:, channels:]), strict=True):
        assert torch.equal(ours, expected)
        assert ours.data_ptr() == expected.data_ptr()
        assert ours.stride() == expected.stride()


PARTS = {"both": (True, True), "the first": (True, False), "the second": (False, True)}


@pytest.mark.parametrize("wanted", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_gradients_of_a_split_keep_their_format(wanted, memory_format):
    x, dy = buffer(memory_format=memory_format).requires_grad_(), buffer(memory_format=memory_format)
    streams, gradients = split(x, 3), (dy[:, :3], dy[:, 3:].clone())  # apart: they must be copied
    roots = [(s, g) for s, g, want in zip(streams, gradients, wanted, strict=True) if want]
    (found,) = torch.autograd.grad([s for s, _ in roots], x, [g for _, g in roots])
    keep = torch.tensor([wanted[0]] * 3 + [wanted[1]] * (2 * C - 3))
    assert torch.equal(found, dy * keep[:, None, None])
    assert found.is_contiguous(memory_format=memory_format)


def test_gradients_side_by_side_are_not_copied():
    x, dy, seen = buffer(memory_format=LAST).requires_grad_(), buffer(memory_format=LAST), []
    x.register_hook(lambda grad: seen.append((grad.data_ptr(), grad.stride())))
    join(*split(x, 3)).backward(dy)
    assert seen == [(dy.data_ptr(), dy.stride())]
    assert torch.equal(x.grad, dy)


class Seen(TorchDispatchMode):
    """Names of the operators, and whether every image that they make is channels_last."""

    def __init__(self):
        super().__init__()
        self.names, self.in_format = set(), True

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.names.add(operator.overloadpacket.__name__)
        made = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]
        self.in_format &= all(is_channels_last(t) for t in made if t.shape[2:] == (H, W))
        return result


@pytest.mark.parametrize("packed", [True, False])
def test_a_chain_of_layers_goes_back_in_its_format(packed):
    """No gradient is copied into zeros or turned into the other format: slices would do both in every layer."""
    layers = [rir.RiRLayer(2 * C, 2 * C), rir.RiRBlock(2 * C, 2 * C), rir.RiRLayer(2 * C, 2 * C, shortcut="none")]
    streams = (buffer(memory_format=LAST).requires_grad_(),)
    streams = streams if packed else split(*streams, C)
    for layer in layers:
        streams = layer.to(memory_format=LAST)(*streams)
        streams = streams if isinstance(streams, tuple) else (streams,)
    with Seen() as seen:
        torch.autograd.backward(streams, [torch.ones_like(stream) for stream in streams])
    assert "convolution_backward" in seen.names
    assert "slice_backward" not in seen.names
    assert seen.in_format


def test_gradcheck_of_a_split():
    x = buffer().double()[:1, :, :3, :2].clone().requires_grad_()
    for function in (
        lambda x: join(*split(x.square(), 3)).square(),
        lambda x: split(x.square(), 3)[0].square(),
        lambda x: split(x.square(), 3)[1].square(),
        lambda x: torch.cat(split(x.square(), 3)[::-1], dim=1).square(),
    ):
        assert torch.autograd.gradcheck(function, (x,), check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, (x,))


def test_streams_that_are_changed_in_place():
    """As the parts of torch.split: refused where autograd records, fine elsewhere."""
    layer, x = rir.RiRLayer(2 * C, 2 * C), buffer()
    r, _ = layer(*halves(x))
    with pytest.raises(RuntimeError, match="modified inplace"):
        r.mul_(2)
    with torch.no_grad():
        r, t = layer(*halves(x))
        before = t.clone()
        r.mul_(2)
        assert torch.equal(t, before)
