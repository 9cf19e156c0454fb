"""The two streams of RiR and their packing, shared by the fused modules and by the reference.

The residual stream r and the transient stream t are the first C_r and the remaining C_t channels of one tensor
x = [r | t], and the four convolutions of a generalized residual layer are one convolution whose weight is made of
blocks, W_ab "from a to b":

    rows (outputs)      W = [ W_rr  W_tr ]  -> r'
                            [ W_rt  W_tt ]  -> t'

Source: Targ, Almeida and Lyman, "Resnet in Resnet", arXiv 1603.08029; the packing is their "ResNet Init" with the
identity kept as an explicit add.
"""

import math

import torch
import torch.nn.functional as F

from .arguments import check_fraction, check_positive_int

# forward's default for t: x holds both streams. Not None, which stands for an absent stream.
PACKED = object()


def split_channels(channels, residual_fraction):
    """Returns the streams' channels (C_r, C_t): C_r = round(residual_fraction * channels), C_r + C_t = channels.

    `round` is Python's: halves go to the even number. Either stream may be empty, at the fractions 0 and 1 or with few
    channels. Raises ValueError if `channels` is not a positive int, or the fraction not a number within [0, 1].
    """
    check_positive_int("channels", channels)
    check_fraction(residual_fraction)
    residual = round(residual_fraction * channels)
    return residual, channels - residual


def as_streams(x, t, in_residual, in_channels):
    """Returns the arguments of a layer's forward as (r, t): both tensors, an absent stream with zero channels.

    If `t` is PACKED, x is (N, in_channels, H, W), and r and t are slices of it. Otherwise x is r (N, in_residual, H, W)
    and t is (N, in_channels - in_residual, H, W); a stream without channels may be None or a tensor with zero channels.
    Raises ValueError for other shapes.
    """
    if t is PACKED:
        check_image("x", x, in_channels)
        return x[:, :in_residual], x[:, in_residual:]
    if x is None and t is None:
        raise ValueError("r and t are both None: pass the streams that the layer has, or one packed tensor")
    r = t[:, :0] if x is None else x
    t = r[:, :0] if t is None else t
    check_image("r", r, in_residual)
    check_image("t", t, in_channels - in_residual)
    if _without_channels(r) != _without_channels(t):
        raise ValueError(f"r and t must agree in batch and image size, got {tuple(r.shape)} and {tuple(t.shape)}")
    return r, t


def join_streams(r, t):
    """Returns the packed tensor [r | t]: a copy, or one stream itself if the other has no channels."""
    if r.shape[1] == 0 or t.shape[1] == 0:  # torch.cat would also let the empty one decide the memory format
        return t if r.shape[1] == 0 else r
    return torch.cat([r, t], dim=1)


def check_image(name, x, channels):
    """Raises ValueError unless x is (N, channels, H, W)."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} must have the shape (N, {channels}, H, W), got {tuple(x.shape)}")


def _without_channels(x):
    return (x.shape[0], *x.shape[2:])


def pack_weight(rr, rt, tr, tt):
    """Packs the weights of the four convolutions into one weight (C_out, C_in, k, k).

    The result is new memory, differentiable by autograd. Each weight is (channels of its output stream, channels of
    its input stream, k, k), or None if one of its two streams is absent. Raises ValueError if the given weights do not
    form a rectangle.
    """
    rows = [(rr, tr), (rt, tt)]  # outputs r', then t'
    inputs = [i for i in (0, 1) if any(row[i] is not None for row in rows)]
    rows = [[row[i] for i in inputs] for row in rows if any(w is not None for w in row)]
    given = ", ".join(
        f"{name} {None if w is None else tuple(w.shape)}" for name, w in dict(rr=rr, rt=rt, tr=tr, tt=tt).items()
    )
    if not rows or any(w is None for row in rows for w in row):
        raise ValueError(f"pack_weight needs every weight between two streams that are there, got {given}")
    for row in rows:
        for w, above in zip(row, rows[0], strict=True):
            if _without_channels(w) != _without_channels(row[0]) or w.shape[1:] != above.shape[1:]:
                raise ValueError(
                    f"weights must agree in output channels per row, in input channels per column: got {given}"
                )
    return torch.cat([torch.cat(row, dim=1) for row in rows], dim=0)


def unpack_weight(weight, in_residual, out_residual):
    """Returns the blocks (rr, rt, tr, tt) of a packed weight (C_out, C_in, k, k): views, None for an absent stream.

    The inverse of `pack_weight`. Raises ValueError if the residual streams are wider than the weight.
    """
    out_channels, in_channels = weight.shape[:2]
    if not (0 <= in_residual <= in_channels and 0 <= out_residual <= out_channels):
        raise ValueError(
            f"the residual streams must lie within the weight's channels, got {in_residual} of {in_channels} inputs "
            f"and {out_residual} of {out_channels} outputs"
        )
    to_r, to_t = weight[:out_residual], weight[out_residual:]
    blocks = (to_r[:, :in_residual], to_t[:, :in_residual], to_r[:, in_residual:], to_t[:, in_residual:])
    return tuple(block if block.shape[0] and block.shape[1] else None for block in blocks)


def init_std(in_channels, kernel_size):
    """Standard deviation of the initial weights: He normal, sqrt(2 / fan_in), with the fan-in of the packed weight.

    Each output sums over both streams, so the four convolutions share the fan-in in_channels * kernel_size**2.
    Source: He et al., "Delving Deep into Rectifiers", arXiv 1502.01852, eq. 10.
    """
    return math.sqrt(2.0 / (in_channels * kernel_size**2))


def needs_projection(shortcut, in_channels, out_channels, stride):
    """Whether a shortcut from a stream of `in_channels` to one of `out_channels` is a 1x1 convolution.

    Only the kind "projection" is one, and only if the shape changes and both streams exist.
    """
    changes = stride != 1 or in_channels != out_channels
    return shortcut == "projection" and changes and in_channels > 0 and out_channels > 0


def pad_shortcut(r, channels, stride):
    """Shortcut without parameters: r (N, C, H, W) -> (N, channels, ceil(H / stride), ceil(W / stride)).

    Returns r itself if nothing changes. Keeps every stride-th pixel, starting with the first; cuts channels, or pads
    them with zeros.

    Source: He et al., "Deep Residual Learning", arXiv 1512.03385, section 4.2, option A.
    """
    if stride != 1:
        r = r[:, :, ::stride, ::stride]
    missing = channels - r.shape[1]
    if missing > 0:
        return F.pad(r, (0, 0, 0, 0, 0, missing))
    return r[:, :channels] if missing < 0 else r


def add_to_first_channels(y, residual):
    """Returns y (N, C, H, W) + [residual | 0], residual (N, C_res, H, W) with C_res <= C, out of place.

    Raises ValueError for other shapes: there is no broadcasting, and the residual must not be wider than y.
    """
    missing = y.shape[1] - residual.shape[1] if residual.dim() == 4 else -1
    if missing < 0 or _without_channels(residual) != _without_channels(y):
        raise ValueError(
            f"residual must have the shape (N, C_res, H_out, W_out) with C_res <= C_out, got {tuple(residual.shape)} "
            f"for the output {tuple(y.shape)}"
        )
    return y + (F.pad(residual, (0, 0, 0, 0, 0, missing)) if missing else residual)
