"""One call of the operation: its tensors, options and numbers, by name."""

from typing import Any, NamedTuple

import torch

from .memory_format import as_channels_last, as_rows
from .spec import ConvBNActSpec


class Call(NamedTuple):
    """y = act(norm(conv(x, weight) + bias + residuals)), as `spec` says; weight None: no convolution.

    num_batches_tracked: one int64, incremented once the call has succeeded; or None.
    """

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    bn_weight: torch.Tensor | None
    bn_bias: torch.Tensor | None
    residuals: tuple[torch.Tensor, ...]
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None
    spec: ConvBNActSpec
    training: bool
    momentum: float

    def inputs(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors that may require gradients: x, weight, bias, bn_weight, bn_bias, residuals."""
        return (self.x, self.weight, self.bias, self.bn_weight, self.bn_bias, *self.residuals)

    def buffers(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors that training updates: running_mean, running_var, num_batches_tracked."""
        return self.running_mean, self.running_var, self.num_batches_tracked

    def having(self, **changes) -> "Call":
        """A copy of the call with these fields changed."""
        # not _replace, which older versions of torch.compile cannot trace
        fields: list[Any] = [changes.get(name, value) for name, value in zip(Call._fields, self, strict=True)]
        return Call(*fields)

    def with_inputs(self, x, weight, bias, bn_weight, bn_bias, *residuals) -> "Call":
        return Call(
            x, weight, bias, bn_weight, bn_bias, residuals, self.running_mean, self.running_var,
            self.num_batches_tracked, self.spec, self.training, self.momentum,
        )  # fmt: skip

    def without_inputs(self) -> "Call":
        """The call without its inputs, which autograd.Function.apply takes as separate arguments."""
        return self.with_inputs(None, None, None, None, None)

    def in_channels_last(self) -> "Call":
        """The call with x and the residuals in the format that the kernels read."""
        x = as_rows(self.x) if self.weight is None else as_channels_last(self.x)
        return self.having(x=x, residuals=tuple(map(as_channels_last, self.residuals)))

    def with_dense_vectors(self) -> "Call":
        """The call with contiguous bias, bn_weight and bn_bias, as the kernels expect; self if they already are."""
        vectors = self.bias, self.bn_weight, self.bn_bias
        if all([vector is None or vector.is_contiguous() for vector in vectors]):
            return self
        bias, bn_weight, bn_bias = (None if vector is None else vector.contiguous() for vector in vectors)
        return self.having(bias=bias, bn_weight=bn_weight, bn_bias=bn_bias)

    def derivative_from_z(self) -> bool:
        """Whether z and the norm give the activation's derivative; a residual after the norm is not kept for it."""
        return self.spec.determined_by_z and not (self.spec.post_norm and len(self.residuals) > 0)

    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in self.inputs()])
