"""Chooses each kernel's tile and estimates its cost."""
