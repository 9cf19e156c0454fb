"""The backward pass, and the operation as registered ops."""
