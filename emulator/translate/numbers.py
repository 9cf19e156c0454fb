"""What translated code computes with: arrays with an element for each thread, in the registers' own bits."""

import numpy as np

from emulator.ptx import Unsupported

LANES = 32


def fma(a, b, c):
    """Rounded to 53 bits and then to 24: off by one ulp of fp32 about once in 2^29."""
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def divide(a, b):
    """Integers, towards zero. By zero it is undefined, and all ones on the GPUs that there are."""
    if a.dtype.kind == "u":
        return np.where(b == 0, np.iinfo(a.dtype).max, a // np.where(b == 0, 1, b).astype(a.dtype))
    divisor = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // divisor
    quotient = quotient + ((a - quotient * divisor != 0) & ((a < 0) != (divisor < 0)))
    return np.where(b == 0, -1, quotient).astype(a.dtype)


def remainder(a, b):
    divisor = np.where(b == 0, 1, b).astype(a.dtype)
    return (a - divide(a, divisor) * divisor).astype(a.dtype)


def shift_left(a, amount):
    bits = 8 * a.itemsize
    return np.where(amount < bits, a << np.minimum(amount, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def shift_right(a, amount):
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(amount, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(amount < bits, shifted, 0).astype(a.dtype)


def high_half(a, b):
    """The upper half of a product."""
    if a.itemsize < 8:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (np.multiply(a, b, dtype=wide) >> wide(8 * a.itemsize)).astype(a.dtype)
    a, b = np.broadcast_arrays(a, b)
    bits = (1 << 64) - 1
    return np.array([int(x) * int(y) >> 64 & bits for x, y in zip(a, b, strict=True)], dtype=np.uint64)


def bit_field(a, start, length):
    """bfe, of a constant position and length; sign-extended where a is signed."""
    bits, kind = 8 * a.itemsize, a.dtype.type
    if not 0 <= start < bits:
        raise Unsupported("bfe past the register")
    length = min(length, bits - start)
    return (a << kind(bits - start - length)) >> kind(bits - length) if length else np.zeros_like(a)


def chosen_bytes(a, b, selector):
    """prmt: for each byte of the result, the one of a (0 to 3) or b (4 to 7), or its sign spread out (8 more)."""
    result = np.zeros_like(a)
    for place in range(4):
        which = selector >> 4 * place & 0xF
        byte = ((b if which & 4 else a) >> np.uint32(8 * (which & 3))) & np.uint32(0xFF)
        if which & 8:
            byte = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        result |= byte << np.uint32(8 * place)
    return result


def to_bf16(a):
    """The bits, rounded to nearest even."""
    bits = np.ascontiguousarray(a).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(a):
    return np.where(np.isnan(a), np.uint16(0x7FFF), a.astype(np.float16).view(np.uint16))


def to_tf32(a):
    """cvt.rna: to nearest, ties away from zero."""
    bits = a.view(np.uint32)
    return np.where(np.isnan(a), bits, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).astype(np.uint32)


def to_integer(a, kind):
    """cvt.rzi: towards zero, saturating; NaN becomes zero."""
    limits = np.iinfo(kind)
    whole = np.trunc(np.nan_to_num(a.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
    return np.clip(whole, limits.min, limits.max).astype(kind)


def pair(high, low):
    """Two registers of 16 bits as one of 32."""
    return (high.astype(np.uint32) << np.uint32(16)) | low


def shuffle(a, mode, amount, clamp):
    """shfl.sync of whole warps."""
    values, lane = a.reshape(-1, LANES), np.arange(LANES)
    amount = amount.reshape(-1, LANES).astype(np.int64) if np.ndim(amount) else int(amount)
    if np.ndim(clamp) or int(clamp) != (0 if mode == "up" else LANES - 1):
        raise Unsupported("shfl of parts of a warp")
    if mode == "bfly":
        source = lane ^ amount
    elif mode == "idx":
        source = np.asarray(amount & (LANES - 1))
    else:
        source = lane + (amount if mode == "down" else -amount)
        source = np.where((source < 0) | (source >= LANES), lane, source)
    return np.take_along_axis(values, np.broadcast_to(source, values.shape), 1).reshape(-1)


def reduce_warp(a, function):
    """redux.sync: what the lanes of a warp have together, in each of them."""
    return np.repeat(function.reduce(a.reshape(-1, LANES), axis=1, dtype=a.dtype), LANES)


def operand_values(bits, kind):
    """What a tensor core takes 16 or 32 bits for."""
    if kind == "bf16":
        return from_bf16(bits)
    return (
        bits.view(np.float16).astype(np.float32) if kind == "f16" else (bits & np.uint32(0xFFFFE000)).view(np.float32)
    )


def fragment(registers, kind, rows):
    """A tensor core's operand in registers, [warps, 8 * rows, k]: lane 4 * row + column, a register for each eight
    rows, and as many again for the other half of k."""
    parts = np.stack(registers).reshape(2, rows, -1, 8, 4)  # [half of k, eight rows, warp, row, column]
    warps = parts.shape[2]
    if kind == "tf32":
        return operand_values(parts.transpose(2, 1, 3, 0, 4).reshape(warps, 8 * rows, 8), kind)
    halves = np.ascontiguousarray(parts)[..., None].view(np.uint16).transpose(2, 1, 3, 0, 4, 5)
    return operand_values(np.ascontiguousarray(halves.reshape(warps, 8 * rows, 16)), kind)


def sums_to_registers(sums):
    """[warps, 16, n], as the lanes of each warp hold it: a row of the result for each register."""
    warps, _, n = sums.shape
    parts = sums.reshape(warps, 2, 8, n // 8, 4, 2)  # [warp, eight rows, row, eight columns, lane's column, of two]
    return parts.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, -1)


def multiply(left, right):
    """In 64 bits, to be rounded with the sum: no order of additions, and so no library's, shows in the result."""
    return left.astype(np.float64) @ right.astype(np.float64)


def multiply_fragments(a, b, c, kind):
    """mma.sync: the four registers of A B + C."""
    product = multiply(fragment(a, kind, 2), fragment(b, kind, 1).swapaxes(1, 2))
    sums = sums_to_registers(product) + np.stack(c).view(np.float32)
    return np.ascontiguousarray(sums, dtype=np.float32).view(np.uint32)
