"""RiRLayer, RiRBlock and ConvBNAct in plain PyTorch: four convolutions, two BatchNorm2d, separate adds and ReLUs."""

from torch import nn

from ..common.arguments import check_block, check_conv_bn_act, check_layer
from ..common.streams import (
    PACKED,
    add_to_first_channels,
    as_streams,
    init_std,
    join_streams,
    needs_projection,
    pad_shortcut,
    split_channels,
)
from .functional import as_tuple, check_dtypes, norm_act


class RiRLayer(nn.Module):
    """Generalized residual layer on two streams, residual r and transient t:

        r' = relu(BN_r(branch_scale * (conv_rr(r) + conv_tr(t)) + shortcut(r)))
        t' = relu(BN_t(branch_scale * (conv_rt(r) + conv_tt(t))))

    Source: Targ, Almeida and Lyman, arXiv 1603.08029, section 2.

    forward(x): packed x = [r | t] (N, in_channels, H, W) -> packed (N, out_channels, H', W'), H' = ceil(H / stride).
    forward(r, t) -> (r', t'): the streams apart. A stream without channels (residual_fraction 0 or 1, or few channels)
    is passed as None or as a tensor with zero channels, and comes back as a tensor with zero channels. Either takes
    `outer`, a tensor (N, C_o, H', W') with C_o <= out_channels that joins the first C_o channels of the sum [r' | t']
    before the norm, unscaled: a block's outer shortcut.

    The streams take split_channels(channels, residual_fraction) of the channels. `shortcut`: "pad" (identity; where the
    residual stream changes shape, every stride-th pixel, channels cut or zero-filled), "projection" (a 1x1 convolution
    without bias where the residual stream changes shape, identity elsewhere) or "none".

    Attributes, each None where its stream is absent: conv_rr, conv_rt, conv_tr, conv_tt ("from, to"), bn_r, bn_t,
    projection. x, r, t and outer share the weights' float dtype (TypeError); ValueError for other shapes and for
    arguments out of range.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        *,
        kernel_size=3,
        stride=1,
        residual_fraction=0.5,
        shortcut="pad",
        branch_scale=1.0,
        eps=1e-5,
        momentum=0.1,
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
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.residual_fraction = residual_fraction
        self.shortcut = shortcut
        self.branch_scale = branch_scale
        self.in_residual, in_transient = split_channels(in_channels, residual_fraction)
        self.out_residual, out_transient = split_channels(out_channels, residual_fraction)
        factory = {"device": device, "dtype": dtype}

        def conv(inputs, outputs):
            if not (inputs and outputs):
                return None
            return nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False, **factory)

        def norm(channels):
            return nn.BatchNorm2d(channels, eps, momentum, **factory) if channels else None

        self.conv_rr = conv(self.in_residual, self.out_residual)
        self.conv_rt = conv(self.in_residual, out_transient)
        self.conv_tr = conv(in_transient, self.out_residual)
        self.conv_tt = conv(in_transient, out_transient)
        self.bn_r = norm(self.out_residual)
        self.bn_t = norm(out_transient)
        self.projection = _projection(shortcut, self.in_residual, self.out_residual, stride, factory)
        self.reset_parameters()

    def reset_parameters(self):
        """He normal, with the fan-in of the packed weight for the four convolutions."""
        std = init_std(self.in_channels, self.kernel_size)
        for weight in self._weights():
            nn.init.normal_(weight, std=std)
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=init_std(self.in_residual, 1))

    def _weights(self):
        return [conv.weight for conv in (self.conv_rr, self.conv_rt, self.conv_tr, self.conv_tt) if conv is not None]

    def forward(self, x, t=PACKED, *, outer=None):
        packed = t is PACKED
        r, t = as_streams(x, t, self.in_residual, self.in_channels)
        check_dtypes(r, t, outer, *self._weights())

        r_addends = [] if self.shortcut == "none" else [_shortcut(r, self.out_residual, self.stride, self.projection)]
        t_addends = []
        if outer is not None:
            if outer.dim() != 4 or outer.shape[1] > self.out_channels:
                raise ValueError(f"outer must be (N, C_o <= {self.out_channels}, H', W'), got {tuple(outer.shape)}")
            r_addends.append(outer[:, : self.out_residual])
            t_addends.append(outer[:, self.out_residual :])

        new_r = self._stream(self.conv_rr, r, self.conv_tr, t, self.bn_r, r_addends)
        new_t = self._stream(self.conv_rt, r, self.conv_tt, t, self.bn_t, t_addends)
        new_r = new_t[:, :0] if new_r is None else new_r
        new_t = new_r[:, :0] if new_t is None else new_t
        return join_streams(new_r, new_t) if packed else (new_r, new_t)

    def _stream(self, conv_r, r, conv_t, t, bn, addends):
        if bn is None:
            return None
        terms = [conv(s) for conv, s in ((conv_r, r), (conv_t, t)) if conv is not None]
        return norm_act(sum(terms), bn, addends, "pre_norm", self.branch_scale)

    def extra_repr(self):
        return (
            f"{self.in_channels}, {self.out_channels}, residual {self.in_residual}->{self.out_residual}, "
            f"kernel_size={self.kernel_size}, stride={self.stride}, shortcut={self.shortcut!r}, "
            f"branch_scale={self.branch_scale:g}"
        )


class RiRBlock(nn.Module):
    """RiR block: `num_layers` generalized residual layers, and an outer shortcut around them.

    Source: arXiv 1603.08029, section 2. Where the outer shortcut joins is settled by no source, so it is a parameter;
    the default follows the ResNet rule: the last sum, before the norm. The stride is the first layer's. forward(x) and
    forward(r, t) are as in RiRLayer.

    outer_shortcut: "pre_norm" (it joins the last layer's sum, before the norm), "post_act" (it is added after the last
    ReLU, and nothing follows) or "none". outer_streams: "residual" (r to r') or "both" (r to r' and t to t').
    `layer_options` go to every layer; the outer shortcut is of the layers' kind `shortcut`. The layers' kind "none"
    leaves the block's choice to outer_shortcut: the outer shortcut is then "pad", as it also is between streams of
    which one has no channels.

    Attributes: layers (ModuleList); projection, projection_t: the outer 1x1 convolutions of r and of t (Conv2d without
    bias), or None.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        *,
        num_layers=2,
        stride=1,
        outer_shortcut="pre_norm",
        outer_streams="residual",
        **layer_options,
    ):
        super().__init__()
        check_block(num_layers, outer_shortcut=outer_shortcut, outer_streams=outer_streams)
        self.outer_shortcut = outer_shortcut
        self.outer_streams = outer_streams
        self.stride = stride
        self.layers = nn.ModuleList([RiRLayer(in_channels, out_channels, stride=stride, **layer_options)])
        self.layers.extend(RiRLayer(out_channels, out_channels, **layer_options) for _ in range(num_layers - 1))

        first, last = self.layers[0], self.layers[-1]
        self.in_channels, self.out_channels = in_channels, out_channels
        self.in_residual, self.out_residual = first.in_residual, last.out_residual
        factory = {name: layer_options.get(name) for name in ("device", "dtype")}
        kind_r = "none" if outer_shortcut == "none" else first.shortcut
        kind_t = kind_r if outer_streams == "both" else "none"
        in_transient, out_transient = in_channels - self.in_residual, out_channels - self.out_residual
        self.projection = _projection(kind_r, self.in_residual, self.out_residual, stride, factory)
        self.projection_t = _projection(kind_t, in_transient, out_transient, stride, factory)
        self.reset_parameters()

    def reset_parameters(self):
        """He normal for the outer projections; the layers look after their own."""
        for projection in (self.projection, self.projection_t):
            if projection is not None:
                nn.init.normal_(projection.weight, std=init_std(projection.in_channels, 1))

    def forward(self, x, t=PACKED):
        packed = t is PACKED
        r, t = as_streams(x, t, self.in_residual, self.in_channels)
        outer = None if self.outer_shortcut == "none" else self._outer(r, t)

        for layer in self.layers:
            joins_here = self.outer_shortcut == "pre_norm" and layer is self.layers[-1]
            r, t = layer(r, t, outer=outer if joins_here else None)

        if outer is not None and self.outer_shortcut == "post_act":
            r = add_to_first_channels(r, outer[:, : self.out_residual])
            t = add_to_first_channels(t, outer[:, self.out_residual :])
        return join_streams(r, t) if packed else (r, t)

    def _outer(self, r, t):
        outer = _shortcut(r, self.out_residual, self.stride, self.projection)
        if self.outer_streams == "both":
            transient = _shortcut(t, self.out_channels - self.out_residual, self.stride, self.projection_t)
            outer = join_streams(outer, transient)
        return outer

    def extra_repr(self):
        return f"stride={self.stride}, outer_shortcut={self.outer_shortcut!r}, outer_streams={self.outer_streams!r}"


class ConvBNAct(nn.Module):
    """Convolution, batch norm and activation, with an optional residual: see reference.functional.conv_bn_act.

    forward(x, residual=None): x (N, in_channels, H, W) -> (N, out_channels, H', W'). kernel_size, stride, padding,
    dilation: int or pair; padding None is kernel_size // 2. activation: "relu" or None. Attributes: conv (Conv2d), bn
    (BatchNorm2d), both with torch's own initialisation. ValueError for arguments out of range.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        *,
        stride=1,
        padding=None,
        dilation=1,
        groups=1,
        bias=False,
        residual_at="post_norm",
        branch_scale=1.0,
        activation="relu",
        eps=1e-5,
        momentum=0.1,
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
        if padding is None:
            padding = tuple(k // 2 for k in kernel_size) if isinstance(kernel_size, (tuple, list)) else kernel_size // 2
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=bias, **factory
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, **factory)
        self.residual_at = residual_at
        self.branch_scale = branch_scale
        self.activation = activation

    def forward(self, x, residual=None):
        check_dtypes(x, self.conv.weight, self.conv.bias, *as_tuple(residual))
        z = self.conv(x)
        return norm_act(z, self.bn, residual, self.residual_at, self.branch_scale, self.activation)

    def extra_repr(self):
        return f"residual_at={self.residual_at!r}, branch_scale={self.branch_scale:g}, activation={self.activation!r}"


def _projection(shortcut, in_channels, out_channels, stride, factory):
    if not needs_projection(shortcut, in_channels, out_channels, stride):
        return None
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **factory)


def _shortcut(stream, channels, stride, projection):
    return pad_shortcut(stream, channels, stride) if projection is None else projection(stream)
