"""What all of the package may use, and that uses nothing of it."""
