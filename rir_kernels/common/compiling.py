"""What torch.compile does not look into."""


def not_traced(function):
    """torch.compile calls the function and takes its result for a constant.

    torch.compiler.assume_constant_result sets the same mark, but imports the compiler for it, and with that triton.
    The compiler sees the mark on plain functions alone: it looks through functools.cache.
    """
    function._dynamo_marked_constant = True
    return function
