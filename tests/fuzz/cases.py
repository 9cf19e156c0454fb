"""Calls of the operation as plain data: what may be drawn, and how it is written down."""

import dataclasses
import json
from dataclasses import dataclass

from hypothesis import strategies as st

LAYOUTS = ("contiguous", "channels_last", "gaps", "offset", "turned", "one image")
# by who computes: the interpreter multiplies the raw bits of bfloat16
DTYPES = {
    "torch": ("float64", "float32", "float16", "bfloat16"),
    "interpreter": ("float32", "float16"),
    "gpu": ("float32", "float16", "bfloat16"),
}
TENSORS = ("x", "weight", "bias", "bn_weight", "bn_bias", "residual0", "residual1")


class Written:
    """Mixin of dataclasses whose fields are plain data."""

    def as_text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_text(cls, text: str):
        data = json.loads(text)
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


@dataclass(frozen=True)
class Case(Written):
    """One call of functional.conv_bn_act. layouts: of x, weight, the residuals and y's gradient, in this order.

    wanted: which of the tensors want a gradient; without any the call is under no_grad. momentum and eps as there.
    """

    batch: int
    size: tuple[int, int]
    channels: tuple[int, int]
    kernel: int
    stride: int
    padding: int
    residuals: tuple[int, ...]
    residual_at: str
    branch_scale: float
    bias: bool
    affine: str
    statistics: bool
    training: bool
    momentum: float
    eps: float
    activation: str | None
    dtype: str
    fp32_norm: bool
    layouts: tuple[str, str, str, str]
    wanted: tuple[str, ...]
    seed: int


def out_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


@st.composite
def cases(draw, by: str) -> Case:
    """Small calls that are legal, what is odd about them among what shrinks away last. by: a key of DTYPES."""
    kernel = draw(st.sampled_from([3, 1]))
    stride, padding = draw(st.sampled_from([1, 2])), draw(st.integers(0, kernel // 2))
    smallest = max(1, kernel - 2 * padding)
    batch, size = draw(st.integers(1, 3)), draw(st.tuples(*[st.integers(smallest, 9)] * 2))
    channels = draw(st.tuples(*[st.one_of(st.integers(1, 8), st.sampled_from([15, 16, 17, 31, 33, 40]))] * 2))
    values = batch * out_size(size[0], kernel, stride, padding) * out_size(size[1], kernel, stride, padding)
    training = draw(st.booleans()) and values > 1  # one value has no variance: an error of its own
    # a norm of a few values takes out nearly all of a gradient: what is left is the rounding of what went
    has_gradients = values > 7 or not training
    residuals = draw(st.lists(st.integers(1, channels[1]), max_size=2))
    statistics = draw(st.booleans()) or not training
    bias, affine = draw(st.booleans()), draw(st.sampled_from(["both", "weight", "bias", "none"]))
    there = ["x", "weight"] + ["bias"] * bias + [f"residual{i}" for i in range(len(residuals))]
    there += [f"bn_{name}" for name in ("weight", "bias") if affine in (name, "both")]
    dtype = draw(st.sampled_from(DTYPES[by]))
    layouts = draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 4))
    if by == "torch" and batch == 1 and 1 in (out_size(s, kernel, stride, padding) for s in size):
        layouts = (*layouts[:3], "contiguous")  # F.batch_norm itself misreads such a gradient lying otherwise, on a CPU
    return Case(
        batch=batch,
        size=size,
        channels=channels,
        kernel=kernel,
        stride=stride,
        padding=padding,
        residuals=tuple(residuals),
        residual_at=draw(st.sampled_from(["pre_norm", "post_norm"])),
        branch_scale=draw(st.sampled_from([1.0, 0.5, -1.5])),
        bias=bias,
        affine=affine,
        statistics=statistics,
        training=training,
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0, 0.7])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        activation=draw(st.sampled_from(["relu", None])),
        dtype=dtype,
        fp32_norm=dtype in ("float16", "bfloat16") and draw(st.booleans()),
        layouts=layouts,
        wanted=tuple(name for name in TENSORS if name in there and draw(st.booleans())) if has_gradients else (),
        seed=draw(st.integers(0, 999)),
    )
