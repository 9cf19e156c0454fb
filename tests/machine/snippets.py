"""A few instructions at a time on the emulator, without Triton."""

import numpy as np

from emulator.machine import late, lockstep
from emulator.machine.global_memory import GlobalMemory
from emulator.machine.threads import Kernel, Launch
from emulator.ptx import parse

HEAD = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet({parameters})
.reqntid {threads}
{{
.reg .pred %p<16>;
.reg .b16 %h<64>;
.reg .b32 %r<64>;
.reg .b64 %d<64>;
mov.u32 %r60, %tid.x;
mov.u32 %r61, %ctaid.x;
mov.u32 %r62, %ntid.x;
mad.lo.s32 %r63, %r61, %r62, %r60;
"""
REGISTERS = {2: "%h", 4: "%r", 8: "%d"}


def execute(body, inputs, outputs, *, threads=32, programs=1, shared=0, maps=(), seed=None):
    """(outputs by name, what the late timing reports).

    body: instructions, in which {name} is the register that holds an input's element of the thread (%r63 is its number
    in the launch, %r60 in its program), or {name_at} the address of an array, and an output's register when it ends.
    inputs: arrays by name; outputs: dtypes. maps: 128 bytes of each tensor map; {map0} is the first one's address.
    seed: of the late timing; None is lockstep.
    """
    count = threads * programs
    arrays = {name: np.ascontiguousarray(a) for name, a in inputs.items()}
    arrays |= {name: np.zeros(count, dtype) for name, dtype in outputs.items()}
    fields = {f"map{i}": f"%d{40 + i}" for i in range(len(maps))}
    lines = [f"mov.b64 %d{40 + i}, snippet_map_{i};" for i in range(len(maps))]
    ends = []
    for number, (name, array) in enumerate(arrays.items()):
        size, address = array.itemsize, f"%d{20 + number}"
        register = f"{REGISTERS[size]}{20 + number}"
        fields |= {name: register, f"{name}_at": f"%d{number}"}
        lines += [f"ld.param.u64 %d{number}, [snippet_param_{number}];", f"mul.wide.u32 {address}, %r63, {size};",
                  f"add.s64 {address}, {address}, %d{number};"]  # fmt: skip
        if name in inputs:
            if len(array) == count:
                lines.append(f"ld.global.b{8 * size} {register}, [{address}];")
        else:
            # an output of eight bytes would overwrite its own address
            place, register = (f"%d{10 + number}", f"%d{50 + number}") if size == 8 else (address, register)
            fields[name] = register
            lines += [f"mov.b64 {place}, {address};"] * (size == 8)
            ends.append(f"st.global.b{8 * size} [{place}], {register};")
    parameters = [f".param .u64 .ptr .global .align 1 snippet_param_{i}" for i in range(len(arrays))]
    parameters += [f".param .align 64 .b8 snippet_map_{i}[128]" for i in range(len(maps))]
    head = HEAD.format(parameters=",\n".join(parameters), threads=threads)
    text = head + "\n".join([*lines, body.format(**fields), *ends, "ret;", "}"])
    program = parse(text)
    block = bytearray(max(offset + size for offset, size in program.parameters.values()))
    values = [a.ctypes.data.to_bytes(8, "little") for a in arrays.values()] + list(maps)
    for (offset, size), value in zip(program.parameters.values(), values, strict=True):
        block[offset : offset + size] = value
    memory = GlobalMemory([(a.ctypes.data, a.nbytes) for a in arrays.values()])
    launch, seen = Launch(Kernel(program), memory, bytes(block), programs), {}
    if seed is None:
        lockstep.run(launch, shared)
    else:
        late.run(launch, shared, seed, seen)
    return {name: arrays[name] for name in outputs}, list(seen)
