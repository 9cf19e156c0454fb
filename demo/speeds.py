"""Times of one layer on a GPU: four naive convolutions, and every implementation of ours. Nothing here runs elsewhere.

Each variant is captured in a CUDA graph, so that the GPU is timed and not Python, and the variants of a layer take
turns. The same buffers are used again and again: what fits into the L2 cache stays there, for every variant alike.
"""

import statistics

import torch
from torch import nn

import rir_kernels as rir

IMPLS = ("auto", "triton", "hybrid", "torch")
ROUNDS, REPLAYS = 9, 20


def measure(shape, dtype=torch.bfloat16) -> list[dict]:
    """Milliseconds of each variant, of inference and of a training step (forward and backward), of one layer."""
    variants, x = set_up(shape, dtype, "cuda")
    return [
        {"shape": shape.name, "batch": shape.batch, "mode": mode, "ms": _milliseconds(variants, x, call)}
        for mode, call in CALLS.items()
    ]


def set_up(shape, dtype, device):
    """(layers of equal weights by name, their input)"""
    naive = rir.reference.RiRLayer(shape.c_in, shape.c_out, kernel_size=shape.kernel, stride=shape.stride)
    naive = naive.to(device, dtype, memory_format=torch.channels_last)
    for module in naive.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()  # as under autocast
    x = torch.randn(shape.batch, shape.c_in, shape.size, shape.size, device=device, dtype=dtype)
    variants = {"naive": naive} | {impl: rir.RiRLayer.from_reference(naive, impl=impl) for impl in IMPLS}
    return variants, x.contiguous(memory_format=torch.channels_last)


def _inference(layer, x):
    layer.eval()
    with torch.no_grad():
        layer(x)


def _training_step(layer, x):
    layer.train()
    x = x.detach().requires_grad_()
    y = layer(x)
    torch.autograd.grad(y, (x, *layer.parameters()), torch.ones_like(y))


CALLS = {"inference": _inference, "training step": _training_step}


def _milliseconds(layers, x, call):
    """Medians over the rounds."""
    graphs = {name: _graph(call, layer, x) for name, layer in layers.items()}
    times = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / REPLAYS)
    return {name: statistics.median(values) for name, values in times.items()}


def _graph(call, *args):
    """call(*args), captured after a warm-up on a stream of its own, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(*args)
    return graph
