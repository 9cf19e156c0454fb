"""One layer's launches, each against fp64: what `launch.conv`, `launch.wgrad` and `launch.batchnorm` are asked for."""

import contextlib
import dataclasses

import torch
import torch.nn.functional as F

from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.launch import batchnorm, conv, wgrad
from rir_kernels.triton.tiling.conv_tiles import use_tile
from tests.kernels.targets import rand

from .judge import assert_exact

PIXELS = (0, 2, 3)


def per_channel(vector):
    return vector.double().view(1, -1, 1, 1)


def truncated(x):
    """fp32 operands as the tensor cores take them for TF32."""
    return (x.view(torch.int32) & -0x2000).view(torch.float32) if x.dtype == torch.float32 else x


def rounded(x):
    """fp32 weights as packing rounds them to TF32."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32) if x.dtype == torch.float32 else x


@contextlib.contextmanager
def tiles_of(batch: int):
    """Tiles are those of that batch: a few images, as many as fill them, stand for the rest."""
    chosen = conv.conv_config, wgrad.wgrad_tile
    if batch:
        conv.conv_config = lambda problem, *rest: chosen[0](dataclasses.replace(problem, n=batch), *rest)
        wgrad.wgrad_tile = lambda problem, *rest: chosen[1](dataclasses.replace(problem, n=batch), *rest)
    try:
        yield
    finally:
        conv.conv_config, wgrad.wgrad_tile = chosen


class Layer:
    """Its methods make the launches of one operation and judge each result."""

    def __init__(self, dtype, c_in, c_out, size, n, kernel=3, stride=1, *, batch=256, seed=0, tile=None):
        self.dtype, self.batch, self.tile = dtype, batch, tile
        self.kernel, self.stride = kernel, stride
        self.c_in, self.c_out = c_in, c_out
        target = torch.device("cpu"), dtype
        self.x = rand((n, c_in, size, size), target, seed=seed) + 0.25
        self.weight = rand((c_out, c_in, kernel, kernel), target, seed=seed + 1, scale=1 / (kernel * c_in**0.5))
        self.spec = ConvBNActSpec(
            stride=(stride, stride), padding=(kernel // 2, kernel // 2), shortcut_channels=min(c_in, c_out) // 2
        )
        self._options = {"stride": stride, "padding": kernel // 2}
        self._draw = torch.Generator().manual_seed(seed + 2)
        self.gamma, self.beta = self._scales(c_out)
        self.mean, self.var = self._normal(c_out) / 4, self._uniform(c_out) + 0.5

    def _normal(self, *shape):
        return torch.randn(shape, generator=self._draw)

    def _uniform(self, *shape):
        return torch.rand(shape, generator=self._draw)

    def _scales(self, channels):
        return self._uniform(channels) + 0.5, self._normal(channels) / 2

    def check(self, operation: str) -> None:
        with tiles_of(self.batch), use_tile(self.tile):
            getattr(self, operation)()

    # what is exact, and the sums of its absolute terms

    def _convolved(self, spec):
        x, weight = truncated(self.x).double(), rounded(self.weight).double()
        z, terms = F.conv2d(x, weight, **self._options), F.conv2d(x.abs(), weight.abs(), **self._options)
        if c := spec.shortcut_channels:
            part = self.x.double()[:, :c, :: self.stride, :: self.stride]
            z[:, :c] += part
            terms[:, :c] += part.abs()
        return z, terms

    def _normed(self, z, terms, mean, invstd):
        mean, beta = per_channel(mean), per_channel(self.beta)
        scale = per_channel(self.gamma) * per_channel(invstd)
        return ((z - mean) * scale + beta).relu(), (terms + mean.abs()) * scale.abs() + beta.abs()

    def _gradient(self):
        shape = self.spec.output_shape(self.x, self.weight)
        return rand(shape, (torch.device("cpu"), self.dtype), seed=7)

    def _data_gradient(self, dz):
        size, weight, d = tuple(self.x.shape), rounded(self.weight).double(), truncated(dz).double()
        exact = torch.nn.grad.conv2d_input(size, weight, d, **self._options)
        terms = torch.nn.grad.conv2d_input(size, weight.abs(), d.abs(), **self._options)
        c = self.spec.shortcut_channels
        exact[:, :c, :: self.stride, :: self.stride] += dz.double()[:, :c]
        terms[:, :c, :: self.stride, :: self.stride] += dz.double()[:, :c].abs()
        return exact, terms

    # the operations

    def plain(self):
        spec = dataclasses.replace(self.spec, shortcut_channels=0)
        z, _ = conv.conv_train(self.x, self.weight, bias=None, residuals=(), spec=spec)
        assert_exact("z", z, *self._convolved(spec))

    def train(self):
        z, moments = conv.conv_train(self.x, self.weight, bias=None, residuals=(), spec=self.spec)
        exact, terms = self._convolved(self.spec)
        assert_exact("z", z, exact, terms)
        running_mean, running_var = self._normal(self.c_out), self._uniform(self.c_out)
        before, batches = (running_mean.double(), running_var.double()), torch.tensor(3)
        found = batchnorm.bn_finalize(
            moments, self.spec.eps, running_mean=running_mean, running_var=running_var, batches=batches, momentum=0.1
        )
        count = exact.numel() // self.c_out
        mean, var, size = exact.mean(PIXELS), exact.var(PIXELS, correction=0), terms.mean(PIXELS)
        spread = size * var.sqrt() + var
        invstd = (var + self.spec.eps).rsqrt()
        assert_exact("mean", found.mean, mean, size)
        assert_exact("var", found.var, var, spread)
        assert_exact("invstd", found.invstd, invstd, (size / var.sqrt() + 1) * invstd)
        assert_exact("running mean", running_mean, 0.9 * before[0] + 0.1 * mean, size + before[0].abs())
        unbiased = var * count / (count - 1)
        assert_exact("running var", running_var, 0.9 * before[1] + 0.1 * unbiased, spread + before[1])
        assert batches.item() == 4

    def infer(self):
        y, _ = conv.conv_infer(
            self.x, self.weight, bias=None, residuals=(), spec=self.spec, save_z=False,
            mean=self.mean, var=self.var, gamma=self.gamma, beta=self.beta,
        )  # fmt: skip
        invstd = (self.var.double() + self.spec.eps).rsqrt()
        assert_exact("y", y, *self._normed(*self._convolved(self.spec), self.mean, invstd))

    def dgrad(self):
        dz = self._gradient()
        dx, _ = conv.conv_data_grad(dz, self.weight, shape=tuple(self.x.shape), spec=self.spec)
        assert_exact("dx", dx, *self._data_gradient(dz))

    def dsums(self):
        """The data gradient with the sums of the norm upstream, where its tile has room for them."""
        dz = self._gradient()
        mean, invstd = self._normal(self.c_in) / 4, self._uniform(self.c_in) + 0.5
        gamma, beta = self._scales(self.c_in)
        upstream = batchnorm.Upstream(self.x, mean, invstd, gamma, beta, relu=True)
        dx, partial = conv.conv_data_grad(dz, self.weight, shape=tuple(self.x.shape), spec=self.spec, upstream=upstream)
        assert_exact("dx", dx, *self._data_gradient(dz))
        if partial is not None:
            self._sums(*batchnorm.bn_sum(partial, 1.0), dx, self.x, mean, invstd, gamma, beta)

    def _sums(self, dbeta, dgamma, dy, z, mean, invstd, gamma, beta):
        xhat = (z.double() - per_channel(mean)) * per_channel(invstd)
        masked = torch.where(per_channel(gamma) * xhat + per_channel(beta) > 0, dy.double(), 0.0)
        assert_exact("dbeta", dbeta, masked.sum(PIXELS), masked.abs().sum(PIXELS))
        assert_exact("dgamma", dgamma, (masked * xhat).sum(PIXELS), (masked * xhat).abs().sum(PIXELS))
        return masked, xhat

    def wgrad(self):
        dz = self._gradient()
        dw = wgrad.conv_weight_grad(dz, self.x, kernel=(self.kernel, self.kernel), spec=self.spec)
        x, d, size = truncated(self.x).double(), truncated(dz).double(), tuple(self.weight.shape)
        exact = torch.nn.grad.conv2d_weight(x, size, d, **self._options)
        assert_exact("dw", dw, exact, torch.nn.grad.conv2d_weight(x.abs(), size, d.abs(), **self._options))

    def norm(self):
        shape, target = self.spec.output_shape(self.x, self.weight), (torch.device("cpu"), self.dtype)
        z, dy = (rand(shape, target, seed=seed) for seed in (3, 4))
        exact = z.double()
        merged = batchnorm.bn_finalize(batchnorm.bn_stats(z), self.spec.eps)
        var = exact.var(PIXELS, correction=0)
        assert_exact("mean", merged.mean, exact.mean(PIXELS), exact.abs().mean(PIXELS))
        assert_exact("var", merged.var, var)
        frozen = batchnorm.bn_running(self.mean, self.var, self.spec.eps)
        assert_exact("invstd", frozen.invstd, (self.var.double() + self.spec.eps).rsqrt())
        y = batchnorm.bn_apply(z, merged, gamma=self.gamma, beta=self.beta, residuals=(), spec=self.spec)
        assert_exact("y", y, *self._normed(exact, exact.abs(), merged.mean, merged.invstd))
        given = {"mean": merged.mean, "invstd": merged.invstd, "gamma": self.gamma, "beta": self.beta}
        dbeta, dgamma = batchnorm.bn_reduce(dy, z, None, spec=self.spec, **given)
        masked, xhat = self._sums(dbeta, dgamma, dy, z, *given.values())
        count = exact.numel() // self.c_out
        dz, _ = batchnorm.bn_apply_grad(dy, z, None, (dbeta, dgamma), count=count, spec=self.spec, **given)
        factor = per_channel(self.gamma) * per_channel(merged.invstd)
        s1, s2 = (per_channel(s) / count for s in (dbeta, dgamma))
        terms = factor.abs() * (masked.abs() + s1.abs() + (xhat * s2).abs())
        assert_exact("dz", dz, factor * (masked - s1 - xhat * s2), terms)


OPERATIONS = ("plain", "train", "infer", "dgrad", "dsums", "wgrad", "norm")
