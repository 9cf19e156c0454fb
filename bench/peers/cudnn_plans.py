"""cuDNN graphs by its frontend: described once per shape, the fastest plan kept, run on torch's current stream."""

import functools
import time

import torch

from bench.measure.timing import device_ms
from rir_kernels.common.switches import tf32_allowed

# of trying plans, per graph: they come best first by cuDNN's own guess, and some take a second to compile
SECONDS = 1.5
_DTYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT", torch.uint8: "BOOLEAN"}

_plans, _choices = {}, {}


class Unsupported(RuntimeError):
    """cuDNN has no plan for a graph."""


def fastest(key, ways):
    """The fastest of several ways to the same result, found when a key is new."""
    key = (tf32_allowed(), key)
    if key not in _choices:
        _choices[key] = min(range(len(ways)), key=_timed(ways).__getitem__)
    return ways[_choices[key]]


def _timed(ways):
    """Milliseconds of each, infinite where cuDNN has no plan; Unsupported where it has none for any."""
    milliseconds, reasons = [], []
    for way in ways:
        try:
            way()  # builds its graphs
            milliseconds.append(_milliseconds(way))
        except Unsupported as error:
            milliseconds.append(float("inf"))
            reasons.append(str(error))
    if len(reasons) == len(ways):
        raise Unsupported("; ".join(reasons))
    return milliseconds


def run(define, options, inputs, outputs):
    """Runs the graph of `define(graph, symbols, *options)` on tensors by name, None left out; returns the outputs."""
    inputs = {name: t for name, t in inputs.items() if t is not None}
    key = (define, options, tf32_allowed(), *map(layout, inputs.items()), *map(layout, outputs.items()))
    if key not in _plans:
        _plans[key] = Plan(define, options, inputs, outputs)
    _plans[key].run(inputs, outputs)
    return outputs


class Plan:
    """The fastest plan of one graph; tensors are found by name."""

    def __init__(self, define, options, inputs, outputs):
        import cudnn

        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"cuDNN's graph {define.__name__} is not built yet: run once before the capture")
        self.device = outputs[next(iter(outputs))].device
        self.names = {name: uid for uid, name in enumerate([*inputs, *outputs], 1)}
        self.graph = new_graph(cudnn, handle=_handle(self.device))
        try:
            describe(cudnn, self.graph, self.names, define, options, inputs, outputs)
            self.graph.validate()
            self.graph.build_operation_graph()
            self.graph.create_execution_plans(list(cudnn.heur_mode.__members__.values()))
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            raise Unsupported(f"cuDNN has no plan for {define.__name__[1:]}: {str(error)[:300]}") from error
        convolves = define.__name__ in ("_conv", "_dgrad", "_wgrad")
        if convolves and outputs["y"].dtype == torch.float32 and not tf32_allowed():
            notes = cudnn.numerical_note
            self.graph.deselect_numeric_notes([notes.TENSOR_CORE, notes.DOWN_CONVERT_INPUTS])
        # scratch: the running statistics must not move while plans are tried
        scratch = {name: torch.empty_like(t) for name, t in outputs.items()}
        self.index, self.workspace = min(self._candidates(inputs, scratch))[1:]

    def _candidates(self, inputs, outputs):
        """(milliseconds, index, bytes of workspace) of the plans that build and run."""
        found, names, reason, deadline = [], set(), None, time.monotonic() + SECONDS
        for index in range(self.graph.get_execution_plan_count()):
            if found and time.monotonic() > deadline:
                break
            name = self.graph.get_plan_name_at_index(index)  # the heuristics propose some twice
            if name in names:
                continue
            names.add(name)
            try:
                self.graph.build_plan_at_index(index)
                self.index, self.workspace = index, self.graph.get_workspace_size_plan_at_index(index)
                found.append((_milliseconds(lambda: self.run(inputs, outputs)), index, self.workspace))
            except Exception as error:  # the frontend has several kinds; the last one is reported if none works
                reason = error
        if not found:
            raise Unsupported(f"none of cuDNN's {len(names)} plans can be built and run: {str(reason)[:300]}")
        return found

    def run(self, inputs, outputs):
        tensors = {self.names[name]: t for name, t in (*inputs.items(), *outputs.items())}
        workspace = torch.empty(max(self.workspace, 1), dtype=torch.uint8, device=self.device)
        self.graph.execute_plan_at_index(tensors, workspace, self.index, handle=_handle(self.device))


def new_graph(cudnn, **where):
    """An empty graph that computes in fp32; where: `handle`, or `device_property` of a device that is not there."""
    return cudnn.pygraph(intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT, **where)


def describe(cudnn, graph, names, define, options, inputs, outputs):
    """Fills the graph with what `define` says, on tensors of these layouts."""
    symbols = {}
    for name, tensor in inputs.items():
        dtype, dim, stride = layout((name, tensor))[1:]
        symbols[name] = graph.tensor(
            name=name, uid=names[name], dim=dim, stride=stride, data_type=getattr(cudnn.data_type, _DTYPES[dtype]),
            is_pass_by_value=tensor.dim() == 0,
        )  # fmt: skip
    produced = define(graph, symbols, *options)
    for name, tensor in outputs.items():
        dtype, dim, stride = layout((name, tensor))[1:]
        symbol = produced[name].set_output(True).set_uid(names[name]).set_dim(dim).set_stride(stride)
        symbol.set_data_type(getattr(cudnn.data_type, _DTYPES[dtype]))


def layout(named):
    """(name, dtype, dim, stride) as cuDNN has them: bits count one by one, numbers and vectors have four dimensions."""
    name, t = named
    if t is None or t.dim() == 0:
        return name, torch.float32, (1, 1, 1, 1), (1, 1, 1, 1)
    if t.dim() == 1:
        return name, t.dtype, (1, t.shape[0], 1, 1), (t.shape[0], 1, t.shape[0], t.shape[0])
    n, c, h, w = t.shape
    shape = (n, 8 * c if t.dtype == torch.uint8 else c, h, w)
    # sizes of one have any stride in torch
    return (
        name,
        t.dtype,
        shape,
        tuple(nhwc(shape)) if t.is_contiguous(memory_format=torch.channels_last) else t.stride(),
    )


def nhwc(shape):
    _, c, h, w = shape
    return [h * w * c, 1, w * c, c]


@functools.cache
def _new_handle(device):
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


def _handle(device):
    import cudnn

    handle = _new_handle(device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


def _milliseconds(call):
    call()
    return device_ms(call, 10)
