"""Runs what Triton compiles for a GPU on a CPU: PTX, instruction by instruction, under Triton's own launcher.

    ptx.py       text to blocks of instructions        machine/    threads, memory, barriers, copies, products; races
    translate/   a block to a Python function          driver/     the CUDA driver that Triton believes to launch on

`run.Emulator(driver.Driver(90))` starts it for a process, as an sm_90; 80 and 100 are known too. It says what kernels
compute and whether they race, not how fast.
"""
