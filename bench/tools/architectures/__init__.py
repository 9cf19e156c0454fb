"""`fuse_` on the networks of other libraries: what it fuses, what it leaves, and whether the numbers stay.

`zoo` lists the networks, `check` judges one, `document` writes the table. On a CPU in fp64: nothing is timed but fuse_.
"""
