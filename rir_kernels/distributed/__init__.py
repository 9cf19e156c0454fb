"""Batch statistics over the ranks of a process group."""
