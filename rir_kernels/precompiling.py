"""precompile: compiles the kernels of a model ahead of its first step, in parallel, with or without the GPU.

The model runs on meta tensors that stand in for tensors on the GPU: the launches are recorded, separate processes
compile them into Triton's cache, and training finds them there.
"""

import contextlib
import copy
import importlib
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .backends.plans import Kinds
from .common import switches, versions
from .common.arguments import check_positive_int


@dataclass(frozen=True)
class PrecompileReport:
    """kernels: how many different ones the model launches; compiled: how many of them were not in Triton's cache yet;
    seconds: how long precompile took."""

    kernels: int
    compiled: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.kernels} kernels, {self.compiled} of them compiled in {self.seconds:.0f} s"


def precompile(
    model: nn.Module,
    *example_inputs,
    batch_sizes: Iterable[int] | None = None,
    training: bool = True,
    workers: int | None = None,
    arch: str | None = None,
) -> PrecompileReport:
    """Compiles every kernel that the fused model will launch into Triton's cache, in parallel, with a progress bar.

        rir.fuse_(model)
        rir.precompile(model, images)                                          # a training step at this batch
        rir.precompile(model, images, batch_sizes=[256, 100], training=False)  # inference, at two others
        rir.precompile(model, images, arch="sm_90")                            # for a GPU that is not here

    The kernels are those for the current GPU, or for a typical one of `arch`. Within torch.autocast("cuda") they are
    those for its dtype; without a GPU torch keeps autocast off, so convert the model to its dtype. The model is not
    changed, and its forward runs on meta tensors, which have no values: a forward that reads values cannot be
    precompiled. For a model under torch.compile, pass the module that was compiled.

    Args:
        model: contains fused units or our modules; on any device, in the dtype and memory format that it will have.
        example_inputs: forward's arguments. Tensors are (N, ...), batch first; only their shape, strides, dtype and
            requires_grad matter.
        batch_sizes: used instead of the examples' own.
        training: the kernels of a training step, forward and backward; False: those of inference, without gradients.
        workers: number of processes; None: one per core.
        arch: such as "sm_90", from "sm_80" on; None: that of the current GPU.

    Raises TypeError for a model that is no nn.Module; ValueError for an invalid `arch`, or a missing one without a GPU,
    and for batch sizes or workers that are not positive; ImportError without Triton; RuntimeError in Triton's
    interpreter, if the forward reads values, or if a kernel cannot be compiled.
    """
    began = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    batches = [None] if batch_sizes is None else list(batch_sizes)
    for batch in () if batch_sizes is None else batches:
        check_positive_int("batch_sizes", batch)
    if workers is not None:
        check_positive_int("workers", workers)
    if missing := versions.triton_missing():
        raise ImportError(f"precompile needs {missing}")
    if switches.interpreting():
        raise RuntimeError("under TRITON_INTERPRET=1 nothing is compiled: unset it before Python starts")
    arch, gpu = _target(arch)
    jobs = dict.fromkeys(job for batch in batches for job in launches(model, example_inputs, batch, training, gpu))
    compiled = _compile(list(jobs), arch, workers or os.cpu_count() or 1)
    return PrecompileReport(len(jobs), compiled, time.perf_counter() - began)


def _target(arch):
    """Returns the (architecture, GPU) to compile kernels for."""
    gpus = importlib.import_module("rir_kernels.triton.tiling.gpus")
    if arch is None:
        if not torch.cuda.is_available():
            raise ValueError('there is no GPU here: name the one that will be, as arch="sm_90"')
        runtime = importlib.import_module("rir_kernels.triton.launch.runtime")
        gpu = runtime.gpu_at(torch.device("cuda", torch.cuda.current_device()))
        return f"sm_{gpu.arch}", gpu
    if not isinstance(arch, str) or not re.fullmatch(r"sm_\d{2,3}", arch) or int(arch[3:]) < min(gpus.ARCHITECTURES):
        raise ValueError(f'arch must be as "sm_90", from "sm_{min(gpus.ARCHITECTURES)}" on, got {arch!r}')
    return arch, gpus.typical_gpu(int(arch[3:]))


def launches(model, example_inputs, batch, training, gpu):
    """Returns the compile jobs of one step."""
    runtime = importlib.import_module("rir_kernels.triton.launch.runtime")
    job_of = importlib.import_module("rir_kernels.triton.jobs").Job.of
    jobs = []
    model = _on_meta(model)
    if model.training != training:  # if the mode already matches, frozen norms stay frozen
        model.train(training)
    inputs = tree_map(lambda value: _like(value, batch) if isinstance(value, torch.Tensor) else value, example_inputs)
    foreseen = runtime.foreseen(lambda *launch: jobs.append(job_of(*launch)), gpu)
    with Kinds.apart(), foreseen, _AutocastOfGpu(), _readable():
        with torch.set_grad_enabled(training):
            outputs = [
                out for out in tree_leaves(model(*inputs)) if isinstance(out, torch.Tensor) and out.requires_grad
            ]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    return jobs


def _on_meta(model):
    """Returns a copy of the model whose tensors have no memory."""
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        copied = torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return copy.deepcopy(model, memo)


def _like(tensor, batch):
    shape = tensor.shape if batch is None or tensor.dim() == 0 else (batch, *tensor.shape[1:])
    copied = torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return copied.requires_grad_(tensor.requires_grad)


class _AutocastOfGpu(TorchFunctionMode):
    """Casts inputs of torch's convolutions and products as torch.autocast("cuda") does, which skips meta tensors."""

    _CAST = frozenset({
        nn.functional.linear, nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d,
        nn.functional.conv_transpose2d, nn.functional.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul,
        torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.addmm, torch.mm, torch.Tensor.mm, torch.baddbmm,
        torch.einsum,
    })  # fmt: skip

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self._CAST and torch.is_autocast_enabled("cuda"):
            args, kwargs = tree_map(self._cast, (args, kwargs))
        return function(*args, **kwargs)

    @staticmethod
    def _cast(value):
        is_wide = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.get_autocast_dtype("cuda")) if is_wide else value


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Rewords the error of a forward that reads values, to say so."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
        raise RuntimeError(
            f"the forward reads values, which tensors on the meta device do not have: precompile the parts of the "
            f"model that do not ({error})"
        ) from error


def _compile(jobs, arch, workers) -> int:
    """Runs the jobs, in order, in that many processes; returns how many had to be compiled."""
    if not jobs:
        return 0
    workers = min(workers, len(jobs))
    idle: SimpleQueue = SimpleQueue()
    with contextlib.ExitStack() as stack:
        for _ in range(workers):
            idle.put(stack.enter_context(_worker(arch)))
        pool = stack.enter_context(ThreadPoolExecutor(workers))

        def run(job):
            ask = idle.get()
            try:
                return job, *ask(job)
            finally:
                idle.put(ask)

        done = _shown(as_completed([pool.submit(run, job) for job in jobs]), len(jobs))
        answers = [future.result() for future in done]
    if failed := [f"{job.kernel}: {error}" for job, _, error in answers if error]:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} kernels cannot be compiled for {arch}: {failed[0]}")
    return sum(compiled for _, compiled, _ in answers)


@contextlib.contextmanager
def _worker(arch) -> Iterator[Callable]:
    """Starts a process that answers jobs. Not by multiprocessing, which would run the user's script again."""
    paths = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    command = [sys.executable, "-m", "rir_kernels.triton.compile_worker"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdin is not None and process.stdout is not None
    jobs, answers = process.stdin, process.stdout

    def send(value):
        pickle.dump(value, jobs)
        jobs.flush()

    def ask(job):
        try:
            send(job)
            return pickle.load(answers)
        except (EOFError, BrokenPipeError):
            return False, f"its process ended with exit code {process.wait()}"

    with process:
        try:
            send(arch)
            yield ask
        finally:
            jobs.close()


def _shown(futures, total):
    """Yields the futures as they complete, with a progress bar."""
    console, progress = importlib.import_module("rich.console"), importlib.import_module("rich.progress")
    return progress.track(futures, "compiling kernels", total, console=console.Console(stderr=True))
