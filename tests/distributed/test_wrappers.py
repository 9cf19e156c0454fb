"""DistributedDataParallel and fully_shard around fused models, and that all ranks launch the same kernels.

fp64 on both sides: they differ by rounding alone.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rir_kernels as rir
from rir_kernels.triton.config import conv_config
from rir_kernels.triton.cost import Problem
from rir_kernels.triton.shapes import SHAPE_TABLE, TRANSITIONS
from tests.distributed.ranks import assert_same, of_all_ranks, part, settled
from tests.surgery_helpers import Net, fused_calls

pytestmark = pytest.mark.xdist_group("distributed")
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SIZES = [1, 3]


OPERATIONS = 7


class Model(nn.Module):
    """What is fused and what is ours, with a projection beside the main path: two norms ready for backward at once."""

    def __init__(self):
        super().__init__()
        self.net = Net()
        self.stem = rir.ConvBNAct(2, 4, 3)
        self.block = rir.RiRBlock(4, 4, shortcut="projection", stride=2)
        self.shortcut = nn.Sequential(nn.Conv2d(2, 4, 1, stride=2, bias=False), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.net(self.block(self.stem(x)) + self.shortcut(x))


def model(*, fused=True, synchronized=False):
    torch.manual_seed(0)
    made = settled(Model())
    if fused:
        assert len(rir.fuse_(made).replaced) == 4
    return rir.convert_sync_batchnorm(made) if synchronized else made


def images():
    return torch.randn(sum(SIZES), 2, 8, 8, generator=torch.Generator().manual_seed(3)).double()


WRAPPED = list(itertools.product((False, True), (False, True), (False, True)))  # synchronized, static graph, view


def _data_parallel():
    results = {}
    x = part(images(), SIZES, dist.get_rank())
    for synchronized, static, view in WRAPPED:
        made = model(synchronized=synchronized)
        ddp = DistributedDataParallel(made, static_graph=static, gradient_as_bucket_view=view)
        with fused_calls(2 * OPERATIONS):
            # the buffers are sent around before each forward, and what backward needs must not be among them
            (ddp(x).square().sum() + ddp(2 * x).square().sum()).backward()
        results[synchronized, static, view] = _state(made)
    return results


def _empty_rank():
    made = model(synchronized=True)
    ddp = DistributedDataParallel(made)
    x = part(images(), [sum(SIZES), 0], dist.get_rank())
    ddp(x).square().sum().backward()
    return _state(made)


def _sharded():
    """{what is sharded: parameters and buffers after one step}"""
    results, mesh = {}, init_device_mesh("cpu", (dist.get_world_size(),))
    for kind in ("whole", "blocks", "norms", "synchronized"):
        made = model(synchronized=kind == "synchronized")
        blocks = [made.net.stem, *made.net.layers, made.block]
        norms = [m for m in made.net.modules() if isinstance(m, nn.BatchNorm2d)]
        for inner in {"whole": [], "norms": norms}.get(kind, blocks):
            fully_shard(inner, mesh=mesh)
        fully_shard(made, mesh=mesh)
        optimizer = torch.optim.SGD(made.parameters(), 0.1)
        x = images() if kind != "synchronized" else part(images(), SIZES, dist.get_rank())
        made(x).square().sum().backward()
        optimizer.step()
        results[kind] = {name: p.full_tensor().detach() for name, p in made.named_parameters()} | dict(
            made.named_buffers()
        )
        if kind != "whole":
            before = [type(m) for m in made.modules()]
            if kind == "blocks":
                with pytest.raises(RuntimeError, match=r"FSDPFused.* undo that first"):
                    rir.unfuse_(made)
            assert [type(m) for m in made.modules()] == before
    return results


def _configurations():
    """What is launched for every layer of the shape table, in words."""
    chosen = []
    for shape, batch, itemsize in itertools.product(SHAPE_TABLE + TRANSITIONS, (1, 5, 64), (2, 4)):
        size, kernel = shape.size // shape.stride, (shape.kernel, shape.kernel)
        channels = {"c": shape.c_out, "k": shape.c_in}
        pixels = {"n": batch, "h": size, "w": size}
        padding = (shape.kernel // 2,) * 2 if shape.stride == 1 else None
        chosen.append(
            repr(conv_config(Problem(**pixels, **channels, taps=kernel, itemsize=itemsize, padding=padding), True))
        )
    return chosen


def _everything():
    return {
        "data parallel": _data_parallel(),
        "empty rank": _empty_rank(),
        "sharded": _sharded(),
        "configurations": _configurations(),
    }


ranks = of_all_ranks(2, _everything)


def _state(model):
    return {f"gradient of {name}": p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


@pytest.mark.parametrize(("synchronized", "static", "view"), WRAPPED)
def test_two_forwards_before_one_backward(ranks, synchronized, static, view):
    """Rank 0's buffers are sent around before each forward: rank 1 goes on from them."""
    found = [rank["data parallel"][synchronized, static, view] for rank in ranks]
    parts = [images()] if synchronized else images().split(SIZES)
    models = [model(fused=False) for _ in parts]
    for made, x in zip(models, parts, strict=True):
        made(x).square().sum().backward()
    for made in models[1:]:
        for mine, sent in zip(made.buffers(), models[0].buffers(), strict=True):
            mine.copy_(sent)
    for made, x in zip(models, parts, strict=True):
        made(2 * x).square().sum().backward()  # torch's own norms would not have both forwards first
    expected = [_state(made) for made in models]
    for rank, result in enumerate(found):
        wanted = dict(expected[0 if synchronized else rank])
        for name in wanted:
            if name.startswith("gradient"):  # averaged
                wanted[name] = sum(one[name] for one in expected) / len(SIZES)
        assert_same(result, wanted, **CLOSE)


def test_rank_without_images(ranks):
    """Its graph has other operators, and the gathers and the buckets of gradients come in the same order still."""
    made = model(fused=False)
    made(images()).square().sum().backward()
    expected = {name: t / 2 if name.startswith("gradient") else t for name, t in _state(made).items()}
    for rank in ranks:
        assert_same(rank["empty rank"], expected, **CLOSE)


@pytest.mark.parametrize("kind", ["whole", "blocks", "norms", "synchronized"])
def test_sharded_step_is_the_unsharded_one(ranks, kind):
    made = model(fused=False)
    made(images()).square().sum().backward()
    if kind == "synchronized":  # the others had the whole batch on each rank
        for p in made.parameters():
            p.grad /= 2
    torch.optim.SGD(made.parameters(), 0.1).step()
    expected = {name: p.detach() for name, p in made.named_parameters()} | dict(made.named_buffers())
    for rank in ranks:
        assert_same(rank["sharded"][kind], expected, **CLOSE)


def test_all_ranks_choose_the_same_tiles(ranks):
    here = _configurations()
    assert len(set(here)) > 10
    assert [rank["configurations"] for rank in ranks] == [here, here]
