"""python -m bench first: the first minutes on a GPU, or on a stand-in for one.

What a stranger's GPU can tell in a few minutes, the most important first: do the kernels compile and launch, are they
exact, how long does a network's training step take, do plans, graphs and overlapping launches agree, how fast is each
kernel. Each step runs in a separate process under a time limit, and leaves a JSON file.
"""

# module of this package: seconds that it may take
STEPS = {"precompile": 100, "exactness": 120, "networks": 120, "layer": 60, "kernels": 120, "tests": 240}
