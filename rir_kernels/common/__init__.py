"""Shared helpers: every part of the package may import them, and they import no other part."""
