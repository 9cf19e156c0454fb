"""What four ranks do for rows 45, 46, 47, 48 and 56: one start of the processes for the tests of both files."""

import copy
import functools
import hashlib
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rir_kernels as rir
from rir_kernels.dispatch.choices import measured_choice
from rir_kernels.triton.shapes import SHAPE_TABLE, TRANSITIONS
from rir_kernels.triton.tiling.conv_cost import Problem
from rir_kernels.triton.tiling.conv_tiles import conv_config, rows_config
from rir_kernels.triton.tiling.wgrad_cost import WgradProblem
from rir_kernels.triton.tiling.wgrad_tiles import wgrad_tile
from tests.distributed.test_sync_parts import _fused, _sequential
from tests.distributed.test_wrappers import OPERATIONS, SIZES, images, model
from tests.distributed.test_wrappers import _state as state
from tests.support.ranks import norms, one_step, part, run_on_ranks, settled
from tests.support.surgery_helpers import fused_calls

WORLD = 4
IMAGES = (2, 0, 3, 4)  # of each rank
STEPS = 60
WRAPPED = list(itertools.product((False, True), (False, True), (False, True)))  # synchronized, static graph, view


@functools.cache
def of_the_ranks():
    """What each of them got."""
    with tempfile.TemporaryDirectory() as folder:
        return run_on_ranks(WORLD, _everything, folder=Path(folder, "ranks"))


def fused_sequential():
    return _fused(_sequential())


def _everything():
    pairs, three = [dist.new_group([0, 1]), dist.new_group([2, 3])], dist.new_group([0, 1, 2])
    return {
        "configurations": configurations(),
        "groups": _in_groups(pairs, three),
        "faults": _faults(),
        "repeats": _repeats(),
        "data parallel": _data_parallel(pairs[0]) if dist.get_rank() < 2 else None,
    }


def configurations():
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
        alike, wide = shape.stride == 1, shape.kernel == 3
        of_wgrad = {"shares_rows": alike and wide, "has_border": alike and wide, "packs": alike}
        problem = WgradProblem(
            **pixels, c_out=shape.c_out, c_in=shape.c_in, kernel=kernel, padding_w=shape.kernel // 2,
            itemsize=itemsize, tensor_cores=True, **of_wgrad,
        )  # fmt: skip
        chosen += [repr(wgrad_tile(problem)), repr(rows_config(batch * size * size, shape.c_out))]
        key = (shape.c_in, shape.c_out, shape.kernel, shape.stride, shape.size, "torch.bfloat16", True)
        chosen.append(repr(measured_choice("NVIDIA H200", key)))
    return chosen


def _repeats():
    """{(hash of a rank's results, hash of the statistics)} of STEPS that begin alike."""
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(dist.get_rank()), requires_grad=True)
    first = rir.convert_sync_batchnorm(settled(rir.RiRLayer(4, 6)).float())
    found = set()
    for _ in range(STEPS):
        layer = copy.deepcopy(first)
        y = layer(x)
        results = [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]
        found.add((_hash(results), _hash(layer.buffers())))
    return found


def _hash(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy())
    return digest.hexdigest()


def _in_groups(pairs, three):
    """Ranks 0 and 1 are a group, and 2 and 3; then 0 to 2, and 3 is alone. Batches are uneven, and one is empty."""
    rank = dist.get_rank()
    x = torch.randn(IMAGES[rank], 4, 5, 5, generator=torch.Generator().manual_seed(rank)).double()
    layer = rir.convert_sync_batchnorm(settled(rir.RiRLayer(4, 6)), pairs[rank // 2])
    paired = one_step(layer, [x], 1)
    layer.zero_grad()
    triple = one_step(rir.convert_sync_batchnorm(layer, three), [x], 1)
    return x, paired, triple


def _faults():
    """{(model, what was wrong on rank 1): the result of the good call after it}"""
    rank = dist.get_rank()
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(rank)).double()
    bad_inputs = {
        "channels": (x[:, :3], ValueError),
        "dtype": (x.float(), TypeError),
        "dimensions": (x[0], ValueError),
        "type": (x.tolist(), TypeError),
    }
    bad_norms = {
        "eps": ({"eps": -1.0}, ValueError),
        "momentum": ({"momentum": "0.1"}, TypeError),
        "one buffer": ({"running_var": None}, ValueError),
    }
    results = {}
    for make in (lambda: nn.BatchNorm2d(4), lambda: rir.ConvBNAct(4, 4, 3), lambda: fused_sequential()):
        kind = type(make()).__name__
        for fault, (bad, error) in bad_inputs.items():
            model = rir.convert_sync_batchnorm(settled(make()))
            if rank == 1:
                # a fused unit raises what its modules raise
                with pytest.raises((error, RuntimeError) if kind == "FusedSequential" else error):
                    model(bad)
            results[kind, fault] = one_step(model, [x], 1)
        for fault, (attributes, error) in bad_norms.items():
            model = rir.convert_sync_batchnorm(settled(make()))
            (norm,) = norms(model)
            good = {name: getattr(norm, name) for name in attributes}
            if rank == 1:
                for name, value in attributes.items():
                    setattr(norm, name, value)
                with pytest.raises(error):
                    model(x)
                for name, value in good.items():
                    setattr(norm, name, value)
            results[kind, fault] = one_step(model, [x], 1)
    return results


def _data_parallel(pair):
    results = {}
    x = part(images(), SIZES, dist.get_rank())
    for synchronized, static, view in WRAPPED:
        made = rir.convert_sync_batchnorm(model(), pair) if synchronized else model()
        ddp = DistributedDataParallel(made, process_group=pair, static_graph=static, gradient_as_bucket_view=view)
        with fused_calls(2 * OPERATIONS):
            # the buffers are sent around before each forward, and what backward needs must not be among them
            (ddp(x).square().sum() + ddp(2 * x).square().sum()).backward()
        results[synchronized, static, view] = state(made)
    return results
