"""The three suites: what is measured. Each file has `cases(selection)`."""
