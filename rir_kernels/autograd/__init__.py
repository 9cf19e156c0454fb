"""What backward needs, and the operation as registered ops."""
