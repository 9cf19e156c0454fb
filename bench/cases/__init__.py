"""What is measured: three suites (kernels, layers, models), each with `cases(selection)`, and what they consist of."""
