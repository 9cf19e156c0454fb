"""Oracles of the quantized networks: the formulas in numpy, an integer convolution, and a network with statistics."""

import numpy as np
import torch
import torch.nn.functional as F

from models.quantized import quantize_
from models.rir import RiR

BITS = {"W4A4": (4, 4), "W8A8": (8, 8), "W4A8": (4, 8)}


def numpy_codes(x, scale, bits, signed):
    """clip(floor(x s [+ 1/2])) in the numbers' own precision, s one number or one per row."""
    x, scale = np.asarray(x), np.asarray(scale)
    scaled = x * scale.reshape(-1, *[1] * (x.ndim - 1)) if scale.ndim else x * scale
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    half = scaled.dtype.type(0.5 if signed else 0)
    return np.clip(np.floor(scaled + half), -high if signed else 0, high)


def numpy_weight_scale(weight, bits):
    weight = np.asarray(weight)
    largest = np.abs(weight).reshape(len(weight), -1).max(1)
    largest = np.where(largest == 0, 1, largest).astype(weight.dtype)
    return weight.dtype.type(2 ** (bits - 1) - 1) / largest


def numpy_activation_scale(bound, bits, signed):
    bound = np.asarray(bound)
    return bound.dtype.type(2 ** (bits - 1) - 1 if signed else 2**bits) / bound


def numpy_conv(x, weight, spec):
    """Tap by tap in int64."""
    x, weight = (np.asarray(t.detach().cpu()).astype(np.int64) for t in (x, weight))
    (sh, sw), (ph, pw), (dh, dw), groups = spec.stride, spec.padding, spec.dilation, spec.groups
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    out, _, kh, kw = weight.shape
    h, w = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    acc = np.zeros((x.shape[0], groups, out // groups, h, w), np.int64)
    x, weight = x.reshape(len(x), groups, -1, *x.shape[2:]), weight.reshape(groups, out // groups, -1, kh, kw)
    for i in range(kh):
        for j in range(kw):
            tap = x[..., i * dh :: sh, j * dw :: sw][..., :h, :w]
            acc += np.einsum("goc,ngchw->ngohw", weight[..., i, j], tap)
    return torch.from_numpy(acc.reshape(len(acc), out, h, w))


def train_a_little(model, steps=4, size=(8, 8), batch=8, classes=10):
    """A few steps at a high rate, so that no statistic is what it started as; the model, in eval mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.train()
    for _ in range(steps):
        x = torch.randn(batch, 3, *size).to(next(model.parameters()))
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(batch) % classes).backward()
        optimizer.step()
    return model.eval()


def thin_network(bits="W4A4", **options):
    torch.manual_seed(0)
    return train_a_little(quantize_(RiR(width=(16, 32, 64), **options), *BITS[bits]))
