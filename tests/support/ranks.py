"""Processes that are the ranks of one group on this machine, and what they run on their parts of a batch."""

import contextlib
import datetime
import functools
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rir_kernels.common import switches

# ranks are forks of a process that has imported what all of them import, and has done nothing else
IMPORTED = ["tests.support.ranks", "torch._dynamo", "torch.distributed.fsdp", "models.training.run"]
multiprocessing.set_forkserver_preload(IMPORTED)
# a collective that not every rank joins ends here: by far longer than any of them takes
PATIENCE = datetime.timedelta(minutes=5)


def run_on_ranks(world, function, *args, folder, device="cpu"):
    """[function(*args) on rank 0, on rank 1, ...]; what one of them raises is raised here.

    function: one of a module, which a new process can import. folder: of this call alone.
    """
    folder.mkdir(parents=True)
    arguments = world, str(folder), device, switches.interpreting(), function, args
    torch.multiprocessing.start_processes(_rank, arguments, nprocs=world, start_method="forkserver")
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(world)]


def _rank(rank, world, folder, device, interpreting, function, args):
    # as in conftest.py, which a new process has not read; triton was not imported in it
    assert switches.interpreting() == interpreting
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)
    if device == "cuda":
        torch.cuda.set_device(rank)
    # a file to meet at: ports are shared with everything else on the machine
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=PATIENCE,
    )  # fmt: skip
    try:
        torch.save(function(*args), f"{folder}/{rank}")
        dist.barrier()  # the file goes with the first rank that leaves
    finally:
        dist.destroy_process_group()


def of_all_ranks(world, function, *args):
    """A fixture for a file of tests: the ranks' results, from one start of the processes."""

    @pytest.fixture(scope="module")
    def results(tmp_path_factory):
        return run_on_ranks(world, function, *args, folder=tmp_path_factory.mktemp("ranks") / "of")

    return results


def part(tensor, sizes, rank):
    """The images that are this rank's."""
    return tensor.split(sizes)[rank]


def one_step(model, inputs, weights):
    """{name: tensor}: y, the gradients of the loss (y * weights).sum(), and the buffers."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = model(*inputs)
    (y * weights).sum().backward()
    named = {"y": y.detach()} | {f"input {i}": x.grad for i, x in enumerate(inputs)}
    named |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return {name: t.detach().cpu().clone() for name, t in (named | dict(model.named_buffers())).items()}


def whole_of(results):
    """What a batch in one process gives, from what its parts gave: images side by side, gradients of weights summed.

    Buffers have to agree bit by bit.
    """
    whole = {}
    for name in results[0]:
        found = [result[name] for result in results]
        if name == "y" or name.startswith("input"):
            whole[name] = torch.cat(found)
        elif name.startswith("gradient"):
            whole[name] = sum(found)
        else:
            assert all(torch.equal(found[0], other) for other in found), f"{name} differs between the ranks"
            whole[name] = found[0]
    return whole


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, check_dtype=False, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


@contextlib.contextmanager
def counted_gathers():
    """[how often this rank gathered]"""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    count, gather = [0], getattr(dist, name)

    @functools.wraps(gather)
    def counting(*args, **kwargs):
        count[0] += 1
        return gather(*args, **kwargs)

    setattr(dist, name, counting)
    try:
        yield count
    finally:
        setattr(dist, name, gather)


def settled(model, dtype=torch.float64, device="cpu"):
    """Norms that are neither fresh nor alike, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    for tensor in model.to(dtype).state_dict().values():
        if tensor.dtype.is_floating_point:
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values + 0.5 if tensor.dim() == 1 else (values - 0.5) / max(1, tensor[0].numel()) ** 0.5)
        else:
            tensor.fill_(3)
    return model.to(device)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
