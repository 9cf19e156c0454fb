"""How long the project's kernels would take on an H200, simulated from their machine code: no GPU takes part.

A kernel is compiled as the launcher would launch it (`kernels`, `tiles`) and disassembled (`disassembly`). The integers
and predicates of each warp's first lane are computed (`operands`, `semantics`, `program`), so branches, barriers and
copies are those of the launch's arguments; what the timing needs of each instruction is decoded once (`decoded`). One
multiprocessor runs event by event (`state`, `multiprocessor`), `timing` scales it to the launch, and `machine` has
every constant. `command`, `run` and `rows` make the table, in the processes of `workers`; `check` and `matmul` hold the
simulation against published figures.
"""
