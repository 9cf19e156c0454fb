"""Runs what Triton compiles for a GPU on a CPU: PTX, instruction by instruction, under Triton's own launcher.

    ptx.py       text to blocks of instructions        machine/    threads, memory, barriers, copies, products; races
    translate/   a block to a Python function          driver/     the CUDA driver that Triton believes to launch on

`emulator.driver.emulate()` starts it for a process. It says what kernels compute and whether they race, not how fast.
"""
