"""The memory that a training step keeps for its backward pass, counted without a GPU: `python -m bench memory`.

`count` is the counter, `networks` what is counted, `run` makes the file, `document` and `chart` what people read.
"""
