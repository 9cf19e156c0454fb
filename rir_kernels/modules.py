"""The fused modules: RiRLayer, RiRBlock and ConvBNAct. They own parameters and buffers; `functional` does the work.

Constructors, forward signatures and semantics are those of `rir_kernels.reference`, which states the formulas. The
inner `conv` and `bn` only hold parameters and buffers and are never called: hooks on them do not run, hooks on the
module do.
"""

from typing import Any

import torch
from torch import nn

from . import reference
from .common.arguments import check_block, check_conv_bn_act, check_layer
from .common.spec import ConvBNActSpec, kept_spec, spec_of_conv
from .common.stream_views import join, split
from .common.streams import (
    PACKED,
    add_to_first_channels,
    as_streams,
    init_std,
    needs_projection,
    pad_shortcut,
    split_channels,
)
from .dispatch import bn_state
from .dispatch.preference import check_impl
from .dispatch.tensors import as_residuals, check_packed, check_projected, check_streams
from .reference import convert


class RiRLayer(nn.Module):
    """Generalized residual layer: one packed convolution, one norm, the identity added inside the kernel.

    forward(x): packed x = [r | t] (N, in_channels, H, W) -> (N, out_channels, H', W'), H' = ceil(H / stride).
    forward(r, t) -> (r', t'): two slices of one buffer, not to be changed in place while autograd records; adjacent r
    and t are not copied. An absent stream is None or has zero channels, and is returned with zero channels. `outer`
    (N, C_o <= out_channels, H', W') is added before the norm: a block's outer shortcut.

    Attributes: weight (out_channels, in_channels, k, k), rows [r' | t'], columns [r | t]; bn (BatchNorm2d);
    projection (Conv2d, 1x1) if shortcut="projection" and the residual stream changes shape, else None.

    impl: see functional.conv_bn_act. Errors as there; ValueError for arguments out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        residual_fraction: float = 0.5,
        shortcut: str = "pad",
        branch_scale: float = 1.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_layer(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            residual_fraction=residual_fraction,
            shortcut=shortcut,
            branch_scale=branch_scale,
            eps=eps,
            momentum=momentum,
        )
        check_impl(impl)
        self.in_channels = in_channels
        self.out_channels = out_channels
        # an op's schema does not accept numpy's numbers
        self.kernel_size = int(kernel_size)
        self.stride = int(stride)
        self.residual_fraction = residual_fraction
        self.shortcut = shortcut
        self.branch_scale = float(branch_scale)
        self.impl = impl
        self.in_residual, _ = split_channels(in_channels, residual_fraction)
        self.out_residual, _ = split_channels(out_channels, residual_fraction)
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size, **factory))
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, **factory)
        self.projection = None
        if needs_projection(shortcut, self.in_residual, self.out_residual, stride):
            self.projection = nn.Conv2d(self.in_residual, self.out_residual, 1, stride, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes the weights: He normal, with the fan-in of the packed weight."""
        nn.init.normal_(self.weight, std=init_std(self.in_channels, self.kernel_size))
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=init_std(self.in_residual, 1))

    def forward(self, x, t=PACKED, *, outer=None):
        packed = t is PACKED
        if not packed:
            x = _pack(self, x, t)
        residuals = []
        if self.projection is not None:
            check_projected(x, self.in_channels, self.projection.weight)
            residuals.append(self.projection(split(x, self.in_residual)[0]))
        if outer is not None:
            residuals.append(outer)
        y = bn_state.conv_bn_act(self.bn, x, self.weight, spec=self._spec(), residuals=tuple(residuals), impl=self.impl)
        return y if packed else split(y, self.out_residual)

    def _spec(self) -> ConvBNActSpec:
        identity = self.shortcut != "none" and self.projection is None
        return kept_spec(
            stride=(self.stride, self.stride),
            padding=(self.kernel_size // 2, self.kernel_size // 2),
            shortcut_channels=min(self.in_residual, self.out_residual) if identity else 0,
            branch_scale=self.branch_scale,
            eps=self.bn.eps,
        )

    def to_reference(self) -> "reference.RiRLayer":
        """Returns an independent, exact copy as four convolutions and two norms; keeps mode, device, requires_grad."""
        return convert.layer_to_reference(self)

    @classmethod
    def from_reference(cls, ref: "reference.RiRLayer", *, impl: str = "auto") -> "RiRLayer":
        """The inverse of `to_reference`, also exact.

        Raises ValueError if `ref` cannot be packed: its four weights must agree in requires_grad, and its two norms in
        everything but their per-channel values.
        """
        return convert.layer_from_reference(cls, ref, impl)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, residual {self.in_residual}->{self.out_residual}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, shortcut={self.shortcut!r}, "
            f"branch_scale={self.branch_scale:g}, impl={self.impl!r}"
        )


class RiRBlock(nn.Module):
    """`num_layers` generalized residual layers and an outer shortcut around them; the stride is the first layer's.

    forward(x) and forward(r, t) as in RiRLayer. outer_shortcut: "pre_norm" (added to the last layer's sum, before its
    norm), "post_act" (added after the last ReLU, nothing follows) or "none"; outer_streams: "residual" or "both"
    (stream by stream). `layer_options` go to every layer, and the outer shortcut has the layers' kind `shortcut`
    ("pad" if that is "none").

    Attributes: layers (ModuleList); projection, projection_t: the outer 1x1 convolutions of the two streams, or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_layers: int = 2,
        stride: int = 1,
        outer_shortcut: str = "pre_norm",
        outer_streams: str = "residual",
        **layer_options,
    ):
        super().__init__()
        check_block(num_layers, outer_shortcut=outer_shortcut, outer_streams=outer_streams)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.outer_shortcut = outer_shortcut
        self.outer_streams = outer_streams
        layers = [RiRLayer(in_channels, out_channels, stride=stride, **layer_options)]
        layers += [RiRLayer(out_channels, out_channels, **layer_options) for _ in range(num_layers - 1)]
        self.layers = nn.ModuleList(layers)
        self.in_residual, self.out_residual = layers[0].in_residual, layers[-1].out_residual
        factory: dict[str, Any] = {name: layer_options.get(name) for name in ("device", "dtype")}
        self.projection, self.projection_t = (
            nn.Conv2d(c_in, c_out, 1, stride, bias=False, **factory)
            if outer_shortcut != "none" and needs_projection(layers[0].shortcut, c_in, c_out, stride)
            else None
            for c_in, c_out in self._outer_channels()
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes the outer projections: He normal. The layers initialize their own."""
        for projection in (self.projection, self.projection_t):
            if projection is not None:
                nn.init.normal_(projection.weight, std=init_std(projection.in_channels, 1))

    def forward(self, x, t=PACKED):
        packed = t is PACKED
        if not packed:
            x = _pack(self, x, t)
        outer = None if self.outer_shortcut == "none" else self._outer(x)
        for layer in self.layers[:-1]:
            x = layer(x)
        y = self.layers[-1](x, outer=outer if self.outer_shortcut == "pre_norm" else None)
        if self.outer_shortcut == "post_act" and outer is not None and outer.shape[1] > 0:
            y = add_to_first_channels(y, outer)
        return y if packed else split(y, self.out_residual)

    def _outer_channels(self):
        """(in, out) channels of the outer shortcut on each stream; (0, 0) if the transient stream has none."""
        both = self.outer_streams == "both"
        transient = (self.in_channels - self.in_residual, self.out_channels - self.out_residual) if both else (0, 0)
        return (self.in_residual, self.out_residual), transient

    def _outer(self, x):
        """The outer shortcut (N, C_o, H', W'); if no stream changes shape, a slice of x or x itself."""
        check_packed(x, self.in_channels)
        (r_in, r_out), (t_in, t_out) = self._outer_channels()
        if (r_in, t_in) == (r_out, t_out) and self.stride == 1:
            return split(x, r_in + t_in)[0]
        r, t = split(x, r_in)
        r = self._shortcut(r, r_out, self.projection)
        return join(r, self._shortcut(t, t_out, self.projection_t)) if t_out else r

    def _shortcut(self, stream, channels, projection):
        if projection is None:
            return pad_shortcut(stream, channels, self.stride)
        check_projected(stream, stream.shape[1], projection.weight)
        return projection(stream)

    def to_reference(self) -> "reference.RiRBlock":
        """Returns an independent, exact copy, like RiRLayer.to_reference."""
        return convert.block_to_reference(self)

    @classmethod
    def from_reference(cls, ref: "reference.RiRBlock", *, impl: str = "auto") -> "RiRBlock":
        """The inverse of `to_reference`, like RiRLayer.from_reference."""
        layers: Any = ref.layers  # a ModuleList does not declare the type of its items
        return convert.block_from_reference(cls, ref, [RiRLayer.from_reference(one, impl=impl) for one in layers])

    def extra_repr(self) -> str:
        return f"stride={self.stride}, outer_shortcut={self.outer_shortcut!r}, outer_streams={self.outer_streams!r}"


def _pack(module, r, t):
    check_streams(r, t)
    return join(*as_streams(r, t, module.in_residual, module.in_channels))


class ConvBNAct(nn.Module):
    """Convolution, batch norm, activation and a residual: the unit of ordinary ResNets and CNNs.

    forward(x, residual=None): x (N, in_channels, H, W), residual (N, C_res <= out_channels, H', W') or two such ->
    (N, out_channels, H', W'). kernel_size, stride, padding, dilation: int or pair; padding None is kernel_size // 2.
    activation: "relu" or None. impl: see functional.conv_bn_act.

    Attributes: conv (Conv2d), bn (BatchNorm2d), both with torch's own defaults and initialisation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        residual_at: str = "post_norm",
        branch_scale: float = 1.0,
        activation: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        impl: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_conv_bn_act(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            residual_at=residual_at,
            branch_scale=branch_scale,
            activation=activation,
            eps=eps,
            momentum=momentum,
        )
        check_impl(impl)
        if padding is None:
            k = kernel_size
            padding = (k[0] // 2, k[1] // 2) if isinstance(k, (tuple, list)) else k // 2
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=bias, **factory
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, **factory)
        self.residual_at = residual_at
        self.branch_scale = float(branch_scale)
        self.activation = activation
        self.impl = impl

    def forward(self, x, residual=None):
        conv = self.conv
        return bn_state.conv_bn_act(
            self.bn,
            x,
            conv.weight,
            bias=conv.bias,
            residuals=as_residuals(residual),
            spec=spec_of_conv(conv, self.residual_at, self.branch_scale, self.activation, self.bn.eps),
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return (
            f"residual_at={self.residual_at!r}, branch_scale={self.branch_scale:g}, activation={self.activation!r}, "
            f"impl={self.impl!r}"
        )
