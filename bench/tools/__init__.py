"""Pages of docs/ that are made from records: the table of faults, the networks of other libraries, the versions."""
