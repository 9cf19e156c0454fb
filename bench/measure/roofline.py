"""The least that an operation can cost: its arithmetic and its traffic, and the time under two measured ceilings.

A pass is one kernel, since no library merges more; its floor is the larger of its two times, and an operation's floor
is the sum over its passes. U is the size of one activation tensor. Inference is one pass: x is read, y written.
Training forward: the convolution (x to z) and, once the statistics are known, the norm (z to y). Backward: the norm's
two sums (dy, z), dz from (dy, z), dx from dz, dW from (dz, x): 9U. An identity that is a slice of x costs nothing; a
residual from elsewhere is read once more, and its gradient written and read.
"""

import dataclasses

from rir_kernels.triton.shapes import Shape


@dataclasses.dataclass(frozen=True)
class Pass:
    flops: float
    bytes: float

    def floor_ms(self, ceilings: dict, dtype: str) -> float:
        compute = self.flops / (ceilings["matmul_tflops"][dtype] * 1e9)
        return max(compute, self.bytes / (ceilings["copy_gbps"] * 1e6))


def total(passes) -> Pass:
    return Pass(sum(p.flops for p in passes), sum(p.bytes for p in passes))


def kernel_passes(shape: Shape, itemsize: int) -> dict[str, Pass]:
    """The pass of each kernel, by the ops of the kernels suite (`finalize` reads next to nothing, and is left out)."""
    out = -(-shape.size // shape.stride)
    x = shape.batch * shape.size**2 * shape.c_in * itemsize
    z = shape.batch * out**2 * shape.c_out * itemsize
    weight = shape.c_out * shape.c_in * shape.kernel**2
    flops = 2 * shape.batch * out**2 * weight
    conv = Pass(flops, x + weight * itemsize + z)
    return {
        "conv_eval": conv,
        "conv_train": conv,
        "normalize": Pass(0, 2 * z),
        "reduce": Pass(0, 2 * z),
        "apply": Pass(0, 3 * z),
        "data_grad": conv,
        "weight_grad": conv,
    }


FORWARD = ("conv_train", "normalize")
BACKWARD = ("reduce", "apply", "data_grad", "weight_grad")


def layer_passes(
    shapes, itemsize: int, *, residual_bytes: float = 0, joins: str = "normalize"
) -> dict[str, list[Pass]]:
    """The passes of layers that follow each other, by mode.

    residual_bytes: of a residual that joins the last layer from outside it, in the pass `joins` of its forward.
    """
    layers = [kernel_passes(shape, itemsize) for shape in shapes]
    if residual_bytes:
        # backward: the last norm's apply writes its gradient, the first data gradient adds it
        for layer, op in (
            (layers[-1], "conv_eval"),
            (layers[-1], joins),
            (layers[-1], "apply"),
            (layers[0], "data_grad"),
        ):
            layer[op] = Pass(layer[op].flops, layer[op].bytes + residual_bytes)
    forward, backward = ([layer[op] for layer in layers for op in ops] for ops in (FORWARD, BACKWARD))
    return {
        "eval": [layer["conv_eval"] for layer in layers],
        "train_fwd": forward,
        "bwd": backward,
        "step": forward + backward,
    }
