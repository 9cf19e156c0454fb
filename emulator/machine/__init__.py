"""What runs a kernel's programs: threads, shared and global memory, barriers, TMA, the tensor cores.

There are two timings. "lockstep": the threads of many programs run together, and what is asynchronous happens at once.
"late": one program after the other, each warp by itself in an order that a seed decides, and what is asynchronous
happens as late as the program allows; `races` watches shared memory.
"""


class Fault(Exception):
    """What would be an error on a GPU, or undefined."""
