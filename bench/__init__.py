"""The benchmark: every kernel, layer and network of ours beside what else a PyTorch user would pick.

`python -m bench --help` lists the commands; README.md beside this says how times are taken and what the files hold.
"""
