"""TensorRT in place of our layers; inference only. What its network holds is said in `tensorrt_network`.

Input and output are channels_last as they come: in 16 bits that is HWC8, the format of its tensor-core kernels, where
the channels divide by 8; elsewhere it chooses between HWC and a copy that torch makes. Weights belong to the engine,
and the memory that it works in is not torch's.
"""

import copy
import importlib

import torch
from torch import nn

from bench.peers.tensorrt_network import TYPES, Translation
from rir_kernels.common.memory_format import dense_channels_last
from rir_kernels.common.switches import tf32_allowed


def absent(device: torch.device) -> str | None:
    """Why it cannot be used on this device, in a line; None where it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "TensorRT needs a CUDA device"
    try:
        version = importlib.import_module("tensorrt").__version__
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        return f"tensorrt cannot be imported: {error}"
    return None if int(version.split(".")[0]) >= 10 else f"needs TensorRT 10 (strongly typed networks), found {version}"


def convert(module: nn.Module, x: torch.Tensor, *, training: bool) -> nn.Module:
    """A copy whose forward is an engine for inputs like x; its parameters and buffers are there, but not read."""
    if training:
        raise NotImplementedError("TensorRT runs inference only")
    import tensorrt as trt

    module = copy.deepcopy(module).eval()
    engine = Engine(trt, module, x)
    module.__class__ = type(f"TensorRT{type(module).__name__}", (type(module),), {"forward": _forward})
    module.engine = engine
    return module


def _forward(self, x):
    return self.engine(x)


class Engine:
    """An engine and its context; a copy is itself, as neither can be copied."""

    def __init__(self, trt, module, x):
        self.logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(self.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        source = network.add_input("x", getattr(trt.DataType, TYPES[x.dtype]), tuple(x.shape))
        translation = Translation(trt, network, x.dtype)
        result = translation.module(module, source)
        result.name = "y"
        network.mark_output(result)
        self.shape, self.dtype, self.output_shape = tuple(x.shape), x.dtype, tuple(result.shape)
        for tensor in (source, result):
            names = _formats(tuple(tensor.shape), x.dtype)
            tensor.allowed_formats = sum(1 << int(getattr(trt.TensorFormat, name)) for name in names)

        config = builder.create_builder_config()
        # a network's many layers would take minutes at the level that tries everything
        config.builder_optimization_level = 5 if translation.convolutions <= 6 else 3
        if not tf32_allowed():
            config.clear_flag(trt.BuilderFlag.TF32)
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise RuntimeError("TensorRT built no engine: its log says why")
        self.runtime = trt.Runtime(self.logger)
        self.engine = self.runtime.deserialize_cuda_engine(serialized)
        self.context = self.engine.create_execution_context()
        if self.context is None or self.engine.get_tensor_dtype("y") != getattr(trt.DataType, TYPES[x.dtype]):
            raise RuntimeError("TensorRT's engine cannot be run, or has another dtype than its input")
        linear = trt.TensorFormat.LINEAR
        self.linear = {name: self.engine.get_tensor_format(name) == linear for name in ("x", "y")}
        self.stream = torch.cuda.Stream(x.device)

    def __deepcopy__(self, memo):
        return self

    def __call__(self, x):
        if tuple(x.shape) != self.shape or x.dtype != self.dtype:
            raise ValueError(f"the engine takes {self.shape} in {self.dtype}, got {tuple(x.shape)} in {x.dtype}")
        x = x.contiguous() if self.linear["x"] else dense_channels_last(x)
        layout = torch.contiguous_format if self.linear["y"] else torch.channels_last
        y = torch.empty(self.output_shape, dtype=self.dtype, device=x.device, memory_format=layout)
        current = torch.cuda.current_stream(x.device)
        # on the default stream TensorRT would synchronize
        stream = self.stream if current == torch.cuda.default_stream(x.device) else current
        if stream is not current:
            stream.wait_stream(current)
        ready = self.context.set_tensor_address("x", x.data_ptr()) and self.context.set_tensor_address(
            "y", y.data_ptr()
        )
        if not (ready and self.context.execute_async_v3(stream.cuda_stream)):
            raise RuntimeError("TensorRT did not run the engine: its log says why")
        if stream is not current:
            current.wait_stream(stream)  # before x or y can be freed and reused on it
        return y.contiguous(memory_format=torch.channels_last) if self.linear["y"] and y.dim() == 4 else y


def _formats(shape, dtype):
    if len(shape) != 4:
        return ("LINEAR",)
    return ("HWC8",) if dtype.itemsize == 2 and shape[1] % 8 == 0 else ("HWC", "LINEAR")
