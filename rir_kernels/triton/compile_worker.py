"""python -m rir_kernels.triton.compile_worker: a process that compiles kernels into Triton's cache, and launches none.

It reads pickles from standard input: first the architecture, such as "sm_90", then jobs. For each job it writes a
pickled (whether it had to compile, None) or (False, error message) to standard output.
"""

import os
import pickle
import sys


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # other prints go to stderr
    os.environ.pop("TRITON_INTERPRET", None)
    arch = pickle.load(sys.stdin.buffer)

    import torch
    from triton import knobs
    from triton.runtime.driver import driver

    from rir_kernels.triton.inspect import _CompileOnlyDriver

    torch.set_num_threads(1)
    driver.set_active(_CompileOnlyDriver(arch))
    missed = []

    def note(*, cache_hit, **_):
        if not cache_hit:
            missed.append(True)

    knobs.compilation.listener = note
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        missed.clear()
        try:
            job.compile()
            answer = bool(missed), None
        except Exception as error:  # the parent re-raises it
            answer = False, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
