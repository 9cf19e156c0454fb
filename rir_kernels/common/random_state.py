"""Seeds, reads and restores torch's random state."""

import contextlib

import torch


def seed_all(seed):
    """Seeds torch's generators, those of GPUs only if CUDA is initialized: torch.manual_seed would queue a seed."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextlib.contextmanager
def undisturbed():
    """Enables gradients whatever the caller set, and restores torch's random state on exit."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        yield


def random_states():
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
