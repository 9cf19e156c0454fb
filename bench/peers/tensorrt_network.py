"""Modules as layers of a TensorRT network.

A norm is folded into the convolution before it (in fp64, rounded once). A shortcut is a matrix on the channels: where
it is diagonal and of the same pixels, x times a vector, which TensorRT fuses as pointwise work; else a 1x1 convolution.
So nothing slices or joins channels, as RiR's pattern otherwise would: TensorRT reads a residual wrongly where it is a
strided view into a concatenation (TensorRT's issue 4854).
"""

import operator

import torch
from torch import fx, nn

import rir_kernels as rir
from rir_kernels.common.spec import spec_of_conv

TYPES = {torch.float16: "HALF", torch.bfloat16: "BF16", torch.float32: "FLOAT"}


class Translation:
    """Modules as layers of a network; each method takes the network's tensors and returns one."""

    def __init__(self, trt, network, dtype):
        self.trt, self.network, self.dtype = trt, network, dtype
        self.convolutions = 0
        self.kept = []  # what the network points at until the engine is built

    def module(self, module, x):
        if type(module) in LAYERS:
            return LAYERS[type(module)](self, module, x)
        values = {}
        for node in _Tracer().trace(module).nodes:
            values[node] = self._node(module, node, x, values)
        return values[node]

    def _node(self, module, node, x, values):
        args = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "placeholder":
            return x
        if node.op == "output":
            return args[0][0]
        layer = module.get_submodule(node.target) if node.op == "call_module" else None
        if type(layer) in LAYERS:
            return LAYERS[type(layer)](self, layer, *args[0], **args[1])
        if node.op == "call_function" and node.target in (operator.add, torch.add):
            return self.sum(*args[0])
        if (node.op, node.target) == ("call_method", "mean") and args[1].get("dim", args[0][1:]) in ((2, 3), ((2, 3),)):
            return self.network.add_reduce(args[0][0], self.trt.ReduceOperation.AVG, 0b1100, False).get_output(0)
        what = node.target if layer is None else type(layer).__name__
        raise NotImplementedError(f"no translation to TensorRT for {node.name} ({node.op} of {what})")

    def conv(self, x, weight, bias=None, *, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
        self.convolutions += 1
        bias = None if bias is None else self.weights(bias)
        layer = self.network.add_convolution_nd(x, weight.shape[0], tuple(weight.shape[2:]), self.weights(weight), bias)
        layer.stride_nd, layer.padding_nd, layer.dilation_nd, layer.num_groups = stride, padding, dilation, groups
        return layer.get_output(0)

    def sum(self, a, b):
        return self.network.add_elementwise(a, b, self.trt.ElementWiseOperation.SUM).get_output(0)

    def relu(self, x):
        return self.network.add_activation(x, self.trt.ActivationType.RELU).get_output(0)

    def shortcut(self, x, matrix, stride):
        """matrix @ the channels of every stride-th pixel."""
        if stride == (1, 1) and matrix.shape[0] == matrix.shape[1] and matrix.equal(matrix.diag().diag()):
            if matrix.diag().eq(1).all():
                return x
            vector = self.constant(matrix.diag().view(1, -1, 1, 1))
            return self.network.add_elementwise(x, vector, self.trt.ElementWiseOperation.PROD).get_output(0)
        return self.conv(x, matrix[:, :, None, None], stride=stride)

    def unit(self, x, weight, bias, bn, spec, shortcuts):
        """One fused operation; shortcuts are (tensor, matrix, stride)."""
        gamma, beta, mean, var = (_exact(t) for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
        gain = gamma * torch.rsqrt(var + bn.eps)
        scale = gain * spec.branch_scale
        shift = (beta - mean * gain) * spec.norm_scale
        if bias is not None:
            shift = shift + scale * _exact(bias)
        geometry = {name: getattr(spec, name) for name in ("stride", "padding", "dilation", "groups")}
        y = self.conv(x, _exact(weight) * scale.view(-1, 1, 1, 1), shift, **geometry)
        for tensor, matrix, stride in shortcuts:
            matrix = matrix if spec.post_norm else matrix * gain[:, None]
            y = self.sum(y, self.shortcut(tensor, matrix, stride))
        return self.relu(y) if spec.activation else y

    def constant(self, tensor):
        return self.network.add_constant(tuple(tensor.shape), self.weights(tensor)).get_output(0)

    def weights(self, tensor):
        """The numbers in the network's dtype, by address: numpy has no bf16."""
        tensor = tensor.detach().to("cpu", self.dtype).contiguous()
        self.kept.append(tensor)
        return self.trt.Weights(getattr(self.trt.DataType, TYPES[self.dtype]), tensor.data_ptr(), tensor.numel())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return type(module) in LAYERS or super().is_leaf_module(module, name)


def _layer(network, layer, x, outer=None):
    """outer: (tensor, matrix, stride), a block's shortcut."""
    shortcuts = [] if outer is None else [outer]
    if layer.shortcut != "none":
        block = _shortcut(layer.in_residual, layer.out_residual, layer.projection)
        matrix = _embedded(layer.out_channels, layer.in_channels, (block, 0, 0))
        shortcuts.append((x, matrix, (layer.stride, layer.stride)))
    return network.unit(x, layer.weight, None, layer.bn, layer._spec(), shortcuts)


def _block(network, block, x):
    (r_in, r_out), (t_in, t_out) = block._outer_channels()
    blocks = [
        (_shortcut(r_in, r_out, block.projection), 0, 0),
        (_shortcut(t_in, t_out, block.projection_t), r_out, r_in),
    ]
    outer = (x, _embedded(block.out_channels, block.in_channels, *blocks), (block.stride, block.stride))
    y = x
    for layer in block.layers:
        joins = layer is block.layers[-1] and block.outer_shortcut == "pre_norm"
        y = _layer(network, layer, y, outer if joins else None)
    return network.sum(y, network.shortcut(*outer)) if block.outer_shortcut == "post_act" else y


def _unit(network, unit, x, residual=None):
    spec = spec_of_conv(unit.conv, unit.residual_at, unit.branch_scale, unit.activation, unit.bn.eps)
    shortcuts = []
    if residual is not None:
        if residual.shape[1] != unit.conv.out_channels:
            raise NotImplementedError("a residual on some of the channels, from outside of a layer")
        shortcuts.append((residual, torch.eye(unit.conv.out_channels, dtype=torch.float64), (1, 1)))
    return network.unit(x, unit.conv.weight, unit.conv.bias, unit.bn, spec, shortcuts)


def _max_pool(network, pool, x):
    if pool.dilation != 1 or pool.ceil_mode or pool.return_indices:
        raise NotImplementedError(f"no translation to TensorRT for {pool}")
    window, stride, padding = (
        v if isinstance(v, tuple) else (v, v) for v in (pool.kernel_size, pool.stride, pool.padding)
    )
    layer = network.network.add_pooling_nd(x, network.trt.PoolingType.MAX, window)
    layer.stride_nd, layer.padding_nd = stride, padding
    return layer.get_output(0)


def _linear(network, linear, x):
    operation = network.trt.MatrixOperation
    weight = network.constant(linear.weight)
    y = network.network.add_matrix_multiply(x, operation.NONE, weight, operation.TRANSPOSE).get_output(0)
    return y if linear.bias is None else network.sum(y, network.constant(linear.bias[None]))


LAYERS = {
    rir.RiRLayer: _layer,
    rir.RiRBlock: _block,
    rir.ConvBNAct: _unit,
    nn.MaxPool2d: _max_pool,
    nn.Linear: _linear,
    nn.ReLU: lambda network, relu, x: network.relu(x),
    nn.Identity: lambda network, identity, x: x,
}


def _shortcut(c_in, c_out, projection):
    """The matrix of a shortcut between two streams; channels are cut or filled up with zeros without a projection."""
    return torch.eye(c_out, c_in, dtype=torch.float64) if projection is None else _exact(projection.weight)[:, :, 0, 0]


def _embedded(rows, columns, *blocks):
    """A matrix of zeros with the blocks (matrix, row, column) in it."""
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    for block, row, column in blocks:
        matrix[row : row + block.shape[0], column : column + block.shape[1]] = block
    return matrix


def _exact(tensor):
    return tensor.detach().to("cpu", torch.float64)
