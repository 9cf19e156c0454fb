"""How a network is trained: recipe.py what it is taught by, run.py the loop, checkpoint.py what survives a kill."""
