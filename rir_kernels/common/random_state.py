"""torch's random state: seeded, read, given back."""

import contextlib

import torch


def seed_all(seed):
    """Seeds torch's generators, a GPU's only where CUDA is up: torch.manual_seed would leave a seed for when it is."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def undisturbed():
    """Gradients are on whatever the caller set, and torch's random state is given back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        yield


def random_states():
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
