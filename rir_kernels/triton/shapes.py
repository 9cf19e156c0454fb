"""The shape table: the layers that every benchmark and the compile gate use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A convolution from c_in to c_out channels on input images of `size` x `size` pixels."""

    c_in: int
    c_out: int
    size: int
    kernel: int = 3
    stride: int = 1
    batch: int = 256

    @property
    def name(self) -> str:
        channels = f"{self.c_in}" if self.c_in == self.c_out else f"{self.c_in}-{self.c_out}"
        kind = ("" if self.kernel == 3 else f" {self.kernel}x{self.kernel}") + ("" if self.stride == 1 else " /2")
        return f"{channels}@{self.size}{kind}"


def _square(*rows):
    return tuple(Shape(c, c, size) for c, size in rows)


# RiR wide, its thin nets, and the 3x3 convolutions of a ResNet at 224
SHAPE_TABLE = _square(
    (96, 32), (192, 16), (384, 8), (48, 32), (16, 32), (32, 16), (64, 8), (64, 56), (128, 28), (256, 14), (512, 7)
)  # fmt: skip

# the other layers of the networks in `models`: stem, stage transitions, projections, head
TRANSITIONS = (
    Shape(3, 96, 32),
    Shape(96, 192, 32, stride=2),
    Shape(192, 384, 16, stride=2),
    Shape(48, 96, 32, kernel=1, stride=2),
    Shape(384, 10, 8, kernel=1),
)
