"""The network that settings, or a checkpoint, name; and the weights of a checkpoint in it."""

import re

import torch
from torch import nn

import models
import rir_kernels as rir
from models.data import load as load_images
from models.quantized import integer as to_integers
from models.quantized import quantize_

from . import checkpoint
from .errors import CheckpointError, SettingsError
from .settings import Settings, continued


def describe(settings: Settings, images) -> dict:
    """What `network` needs, as plain data: it stands in every checkpoint."""
    return {
        "name": settings.model,
        "num_classes": images.num_classes,
        "in_channels": images.channels,
        "options": settings.options,
        "quantize": settings.quantize,
        "dtype": "float64" if settings.precision == "fp64" else "float32",
        "layers": "reference" if settings.impl == "reference" else "packed",
    }


def network(description: dict, *, impl: str = "auto", device=None) -> nn.Module:
    """A new network with random weights. SettingsError for names and options that do not exist, and for an `impl` that
    cannot run on the device.

    impl "reference" has the naive layers, whose parameters have other names: it goes with "layers": "reference" alone.
    """
    naive = description["layers"] == "reference"
    if naive != (impl == "reference") and impl != "auto":
        raise SettingsError(f"impl={impl!r} needs {'packed' if naive else 'naive'} layers, and these are not")
    layers = {"layers": rir.reference} if naive else {"layers": rir, "impl": impl}
    _check_impl(impl, device, getattr(torch, description["dtype"]))
    try:
        model = models.create(
            description["name"],
            description["num_classes"],
            in_channels=description["in_channels"],
            device=device,
            dtype=getattr(torch, description["dtype"]),
            **layers,
            **description["options"],
        )
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{description['name']}: {error}") from error
    return model if description["quantize"] is None else _quantized(model, description["quantize"])


def load(path, *, impl: str = "auto", device="cpu") -> tuple[nn.Module, dict]:
    """(the network of a checkpoint with its final or averaged weights, in eval mode, and the checkpoint's facts).

    CheckpointError where the file is none, or where its tensors are not those of the network that it names. That is
    found on the meta device: a file that somebody made up takes no memory beyond its own.
    """
    outline, facts = checkpoint.load_outline(path)
    part = "average" if any(name.startswith("average.") for name in outline) else "model"
    expected = section(outline, part)
    try:
        _check_layers(facts["model"]["options"], len(expected))
        skeleton = network(facts["model"], device="meta")
    except Exception as error:  # what stands in it may be anything
        raise CheckpointError(f"{path}: no network can be built from what stands in it ({error})") from error
    checkpoint.check_fits(path, skeleton.state_dict(), expected)
    model = network(facts["model"], impl=impl, device=device)
    model.load_state_dict(section(checkpoint.load(path, part + ".")[0], part))
    return model.eval(), facts


def _check_layers(options, tensors):
    """ValueError for more layers than a file of so many tensors can have: each would become a module."""
    layers = sum(options.get("depth", ())) * options.get("layers_per_block", 1)
    if layers > tensors:
        raise ValueError(f"{layers} layers, and {tensors} tensors")


def _check_impl(impl, device, dtype):
    """Tries it on one pixel. A name that was asked for never falls back, so it may be refused."""
    if impl in ("auto", "reference"):
        return
    x = torch.ones(1, 1, 1, 1, device=device, dtype=dtype)
    mean, var = torch.ones(2, 1, device=device, dtype=dtype)
    try:
        rir.functional.conv_bn_act(x, x, running_mean=mean, running_var=var, impl=impl)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error


def _quantized(model, bits):
    found = re.fullmatch(r"W(\d)A(\d)", bits, re.IGNORECASE)
    if not found:
        raise SettingsError(f"quantize takes bits of weights and activations as in W4A4, got {bits!r}")
    weight_bits, activation_bits = map(int, found.groups())
    try:
        return quantize_(model, weight_bits, activation_bits)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def images(facts: dict, source: str | None = None, *, image_size: int | None = None):
    """The images that a checkpoint's network was trained with, or others of the same kind from `source`.

    CheckpointError where their channels or classes are not the network's.
    """
    settings = continued(facts.get("settings"), {})
    found = load_images(source or settings.data, image_size=image_size or settings.image_size)
    for what in ("channels", "num_classes"):
        wanted = facts["model"]["in_channels" if what == "channels" else what]
        if getattr(found, what) != wanted:
            raise CheckpointError(f"the network is for {wanted} {what}, and {found.name} has {getattr(found, what)}")
    return found


def scale(facts: dict, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, deviation) of each channel of the images that a checkpoint's network was trained with."""
    try:
        return tuple(torch.tensor(facts["data"][name], dtype=torch.float64, device=device) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint does not say what its images were like ({error!r})") from error


def integer(path, model: nn.Module) -> nn.Module:
    """A quantized network in integers; CheckpointError for one that cannot be."""
    try:
        return to_integers(model)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def section(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """Those named `part.…`, by the rest of their names."""
    return {name[len(part) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(part + ".")}


def sectioned(part: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reverse of `section`."""
    return {f"{part}.{name}": tensor for name, tensor in tensors.items()}
