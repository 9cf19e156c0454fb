"""Arithmetic: what Triton compiles."""
