"""Small experiments on why the networks are built as they are; each is a module to run."""
