"""DistributedDataParallel and fully_shard around fused models.

fp64 on both sides: they differ by rounding alone.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rir_kernels as rir
from tests.support.ranks import assert_same, of_all_ranks, part, settled
from tests.support.surgery_helpers import Net

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


def _fused_after_sharding():
    """(names of convolutions and norms, names of entries that say why they are in no fused operation)"""
    made = model(fused=False)
    for block in (made.net.stem, *made.net.layers):
        fully_shard(block, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    report = rir.fuse_(made.net)
    parts = [name for name, m in made.net.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    return parts, [item.name for item in report.skipped], len(report.replaced)


def _everything():
    return {
        "empty rank": _empty_rank(),
        "sharded": _sharded(),
        "fused after sharding": _fused_after_sharding(),
    }


ranks = of_all_ranks(2, _everything)


def _state(model):
    return {f"gradient of {name}": p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


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


def test_blocks_that_are_sharded_already_are_left_with_a_reason(ranks):
    for rank in ranks:
        parts, entries, replaced = rank["fused after sharding"]
        assert parts and set(parts) <= set(entries) and not replaced
