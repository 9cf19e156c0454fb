"""The best eager form: one convolution and one norm, and everything in place that autograd lets be."""

import copy

import torch.nn.functional as F
from torch import nn

import rir_kernels as rir
from rir_kernels.dispatch.tensors import as_residuals


class MergedRiRLayer(rir.RiRLayer):
    """The same parameters; plain PyTorch in forward."""

    def forward(self, x, *, outer=None):
        z = F.conv2d(x, self.weight, None, self.stride, self.kernel_size // 2)
        if self.branch_scale != 1.0:
            z = z * self.branch_scale
        if self.projection is not None:
            z[:, : self.out_residual] += self.projection(x[:, : self.in_residual])
        elif self.shortcut != "none":
            channels = min(self.in_residual, self.out_residual)
            z[:, :channels] += x[:, :channels, :: self.stride, :: self.stride]
        if outer is not None:
            z[:, : outer.shape[1]] += outer
        return F.relu(self.bn(z), inplace=True)


class MergedConvBNAct(rir.ConvBNAct):
    """The same parameters; plain PyTorch in forward."""

    def forward(self, x, residual=None):
        z = self.conv(x)
        before = self.residual_at == "pre_norm"
        y = self.bn(self._join(z, residual)) if before else self._join(self.bn(z), residual)
        return F.relu(y, inplace=True) if self.activation == "relu" else y

    def _join(self, y, residual):
        if self.branch_scale != 1.0:
            y = y * self.branch_scale
        for part in as_residuals(residual):
            if part.shape[1] == y.shape[1]:
                y += part
            else:
                y[:, : part.shape[1]] += part
        return y


_CLASSES = {rir.RiRLayer: MergedRiRLayer, rir.ConvBNAct: MergedConvBNAct}


def convert(module: nn.Module) -> nn.Module:
    """A copy of a module made of our layers, each in its merged form."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        layer.__class__ = _CLASSES.get(type(layer), type(layer))
    return module
