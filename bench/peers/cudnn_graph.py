"""cuDNN's graph API, by `nvidia-cudnn-frontend`, in place of our kernels.

Inference is one graph: convolution, scale and shift, residuals, ReLU; the norm is folded into the vectors. Training is
the convolution with the residuals and no more (statistics in its epilogue are fp16 only, and the frontend cannot
finish them), then batch norm with ReLU; backward takes the ReLU's mask from z again (or keeps it in bits, where a
residual joins after the norm), then both gradients of the convolution, the identity's joined to the first. Residuals
on some of the channels are read with a mask over the channels: cuDNN adds nothing narrower.
"""

import copy
import functools
import importlib

import torch
import torch.nn.functional as F
from torch import nn

import rir_kernels as rir
from bench.peers import cudnn_ops
from rir_kernels.common.activations import RELU
from rir_kernels.common.memory_format import dense_channels_last
from rir_kernels.common.spec import spec_of_conv
from rir_kernels.dispatch.tensors import as_residuals, autocast_dtype

NORM_CHANNELS = 8  # cuDNN's batch norm reads so many at a time, and keeps the ReLU's mask in bytes of so many


def absent(device: torch.device) -> str | None:
    """Why it cannot be used on this device, in a line; None where it can."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "cuDNN needs a CUDA device"
    try:
        version = importlib.import_module("cudnn").backend_version()
    except (ImportError, AttributeError) as error:
        return f"nvidia-cudnn-frontend cannot be imported: {error}"
    except RuntimeError as error:  # the frontend is there, the library is not
        return f"cuDNN's library is not found: {error}"
    if version < 90000:
        return f"needs cuDNN 9, found {version}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "cuDNN's fused batch norm needs compute capability 8.0"
    return None


def convert(module: nn.Module, x: torch.Tensor, *, training: bool) -> nn.Module:
    """A copy whose layers of ours run on cuDNN; in training those that its norm refuses stay plain PyTorch."""
    module = copy.deepcopy(module).train(training)
    for name, layer in module.named_modules():
        if type(layer) in _CLASSES:
            if type(layer.bn) is not nn.BatchNorm2d or not (layer.bn.affine and layer.bn.track_running_stats):
                raise NotImplementedError(f"{name or 'the module'}: cuDNN's norm needs weights and running statistics")
            if training and layer.bn.num_features % NORM_CHANNELS:
                layer.impl = "torch"
            else:
                layer.__class__ = _CLASSES[type(layer)]
                layer.folded = None if training else _folded(layer)
    return module


class CudnnRiRLayer(rir.RiRLayer):
    """The same parameters; cuDNN in forward."""

    def forward(self, x, *, outer=None):
        residuals = [] if self.projection is None else [self.projection(x[:, : self.in_residual])]
        return _forward(self, x, self.weight, None, self._spec(), [*residuals, *as_residuals(outer)])


class CudnnConvBNAct(rir.ConvBNAct):
    """The same parameters; cuDNN in forward."""

    def forward(self, x, residual=None):
        return _forward(self, x, self.conv.weight, self.conv.bias, _unit_spec(self), as_residuals(residual))


_CLASSES = {rir.RiRLayer: CudnnRiRLayer, rir.ConvBNAct: CudnnConvBNAct}


def _unit_spec(unit):
    return spec_of_conv(unit.conv, unit.residual_at, unit.branch_scale, unit.activation, unit.bn.eps)


def _forward(layer, x, weight, bias, spec, residuals):
    dtype = autocast_dtype(x.device) or x.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    residuals = [r.to(dtype) for r in residuals if r.shape[1] > 0]
    bn = layer.bn
    if not bn.training:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *layer.parameters())):
            raise NotImplementedError(
                "inference is one graph that keeps nothing for a backward: evaluate under torch.no_grad()"
            )
        return _infer(layer, x, weight, spec, residuals)
    if bias is not None:
        raise NotImplementedError(
            "cuDNN's graphs have no gradient of a convolution's bias: leave it out, the norm cancels it"
        )
    momentum = bn.momentum if bn.momentum is not None else 1.0 / float(bn.num_batches_tracked + 1)
    y = _Train.apply(x, weight, bn.weight, bn.bias, bn, momentum, spec, *residuals)
    bn.num_batches_tracked.add_(1)
    return y


@torch.no_grad()
def _folded(layer):
    """The norm with its running statistics, in fp32: the factor on the convolution, what is added, the factor on a
    residual before the norm, and room for that factor times the masks."""
    bn, is_unit = layer.bn, isinstance(layer, rir.ConvBNAct)
    spec, bias = (_unit_spec(layer), layer.conv.bias) if is_unit else (layer._spec(), None)
    gain = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    shift = spec.norm_scale * (bn.bias - bn.running_mean * gain)
    scale = spec.branch_scale * gain
    if bias is not None:
        shift = shift + scale * bias
    return scale, shift, None if spec.post_norm else gain, {}


def _infer(layer, x, weight, spec, residuals):
    if layer.folded is None:
        raise RuntimeError("converted for training: convert again, with training=False")
    scale, shift, gain, gains = layer.folded
    x, weight = dense_channels_last(x), dense_channels_last(weight)
    if spec.shortcut_channels:
        residuals = [spec.shortcut(x), *residuals]
    addends = []
    for residual in residuals:
        r, mask = _widened(residual, weight.shape[0])
        if gain is not None and mask is not None:
            if residual.shape[1] not in gains:
                gains[residual.shape[1]] = gain * mask
            mask = gains[residual.shape[1]]
        addends.append((r, gain if mask is None else mask))
    return cudnn_ops.conv(x, weight, spec, scale=scale, shift=shift, addends=addends, relu=spec.activation == RELU)


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gamma, beta, bn, momentum, spec, *residuals):
        x, weight = dense_channels_last(x), dense_channels_last(weight)  # not outside, where autograd would follow
        channels, before, after = weight.shape[0], [], None
        if spec.shortcut_channels:
            before.append(_widened(spec.shortcut(x), channels))
        if residuals and spec.post_norm:
            after = sum(dense_channels_last(_padded(r, channels)) for r in residuals)
        elif residuals:
            before += [_widened(r, channels) for r in residuals]
        z = cudnn_ops.conv(x, weight, spec, scale=_filled(spec.conv_scale, channels, gamma), addends=before)
        scaled = [p * spec.norm_scale if spec.norm_scale != 1.0 else p for p in (gamma, beta)]
        fused = after is not None and spec.activation == RELU  # a sum without a ReLU is no pattern of cuDNN's
        y, mean, invstd, mask = cudnn_ops.bn_train(
            z, *scaled, bn.running_mean, bn.running_var, momentum=momentum, eps=bn.eps, relu=spec.activation == RELU,
            residual=after if fused else None,
        )  # fmt: skip
        if after is not None and not fused:
            y += after
        ctx.save_for_backward(x, weight, z, *scaled, mean, invstd, mask)
        ctx.spec, ctx.widths = spec, [r.shape[1] for r in residuals]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, z, gamma, beta, mean, invstd, mask = ctx.saved_tensors
        spec, dy, needed = ctx.spec, dense_channels_last(dy), ctx.needs_input_grad
        want = any(needed[7:]) and mask is not None
        dz, dgamma, dbeta, dresidual = cudnn_ops.bn_backward(
            dy, z, gamma, beta, mean, invstd, mask, relu=spec.activation == RELU, want_residual=want
        )
        if not spec.post_norm:
            dresidual = dz
        elif spec.activation is None:
            dresidual = dy
        dx = _data_grad(dz, x, weight, spec, _filled(spec.conv_scale, x.shape[1], gamma)) if needed[0] else None
        dw = cudnn_ops.wgrad(dz, x, spec, weight.shape) if needed[1] else None
        if dw is not None and spec.conv_scale != 1.0:
            dw *= spec.conv_scale
        if spec.norm_scale != 1.0:
            dgamma, dbeta = dgamma * spec.norm_scale, dbeta * spec.norm_scale
        residuals = [dresidual[:, :c] if need else None for c, need in zip(ctx.widths, needed[7:], strict=True)]
        return dx, dw, dgamma, dbeta, None, None, None, *residuals


def _data_grad(dz, x, weight, spec, scale):
    channels = spec.shortcut_channels
    # of the same pixels and no more channels than dz has: read in place; otherwise a sum over a part of dx is less
    fits = channels > 0 and spec.stride == (1, 1) and dz.shape[1] >= x.shape[1]
    addends = [_widened(dz[:, :channels], x.shape[1])] if fits else []
    dx = cudnn_ops.dgrad(dz, weight, spec, x.shape, scale=scale, addends=addends)
    if channels and not fits:
        spec.shortcut(dx).add_(dz[:, :channels])
    return dx


def _widened(residual, channels):
    """(r, mask): the residual with that many channels, and which of them count.

    A slice of channels is read with its neighbours, as far as its pixels reach, and they are masked; else it is padded.
    """
    c = residual.shape[1]
    if c == channels:
        return dense_channels_last(residual), None
    n, _, h, w = residual.shape
    dense = residual.stride()[1:] == (1, w * residual.stride(3), residual.stride(3))
    if dense and residual.stride(3) >= channels and residual.storage_offset() % residual.stride(3) == 0:
        wide = residual.as_strided((n, channels, h, w), residual.stride())
        return wide, _first(c, channels, residual.device)
    return dense_channels_last(_padded(residual, channels)), None


def _padded(residual, channels):
    return F.pad(residual, (0, 0, 0, 0, 0, channels - residual.shape[1]))


@functools.cache
def _first(count, channels, device):
    """1 for the first so many channels, 0 for the others."""
    return (torch.arange(channels, device=device) < count).float()


def _filled(value, channels, like):
    return None if value == 1.0 else like.new_full((channels,), value)
