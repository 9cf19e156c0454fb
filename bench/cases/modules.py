"""Variants that are modules: prepared, judged by `compare`'s yardstick, and called."""

import functools
from collections.abc import Callable

import torch
from torch import nn

from bench import peers
from bench.cases.case import Variant
from bench.measure.gate import verdict
from bench.measure.launches import launches
from rir_kernels.equivalence import Yardstick, observe


def prepared(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """On the device, in channels_last, convolutions in the dtype and norms in fp32, as under autocast.

    The norms' numbers are not ones and zeros, so that none can be forgotten.
    """
    module = module.to(device, dtype, memory_format=torch.channels_last)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.float()
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
    return module


class Judge:
    """Sets up variants of one reference on one input, in one mode, with what they share computed once."""

    def __init__(self, reference: nn.Module, x: torch.Tensor, training: bool):
        self.x, self.training = x, training
        self.yardstick = Yardstick(reference, (x,), training, gradients=training)

    def variant(self, impl: str, module: nn.Module, calls: Callable) -> Variant:
        """calls(module, x, y): what to time, by mode; y is an output as the reference gives it."""
        config = {"of": "merged"} if impl in peers.compiled.IMPLS else {}

        def check():
            with launches() as seen:
                found = observe(module, (self.x,), gradients=self.training)
            if seen:
                config["launches"] = seen
            return verdict(self.yardstick.judge(found))

        y = self.yardstick.given[0].tensors["output", "output"]
        return Variant(calls(module, self.x, y), check, config)


def latest(make: Callable) -> Callable:
    """make(...), kept until it is asked for something else: goldens and inputs are large."""
    return functools.lru_cache(maxsize=1)(make)


def inference(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Callable]:
    @torch.no_grad()
    def call():
        return module(x)

    return {"eval": call}
