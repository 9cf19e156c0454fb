"""A call on its way: checked, the plan of one like it found, an implementation chosen."""
