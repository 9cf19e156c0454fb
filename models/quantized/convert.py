"""A model, quantized in place: every layer becomes its quantized twin.

The rule of arXiv 2105.03536: all weights and activations at 4 bits, but the first convolution and the last layer at 8.
"""

from torch import nn

from rir_kernels.surgery.class_swap import is_fused

from .codes import check_bits
from .layers import TWINS, become
from .quantizer import Quantizer
from .signs import convolutions


def quantize_(model: nn.Module, weight_bits=4, activation_bits=4, first_last_bits=8, start_step=0) -> nn.Module:
    """Make every RiRLayer, ConvBNAct, Conv2d and Linear of `model` quantized, in place; returns the model.

    Exactly these types, subclasses stay as they are. Parameters are the same objects, state_dict keys stay, and the
    buffers quantizer.bound and quantizer.batches join them, so load a float checkpoint before. bits: 2 to 8, or None to
    leave that side float; both sides of the first and the last convolution in the order of the calls have
    `first_last_bits`. The 1x1 convolution of a shortcut has the bits of the layer that it goes around, in an RiRBlock
    those of the block's first. Activations are float for `start_step` batches of training.

    Inputs that may be negative get signed codes: which ones is proved from the graph of the forward, see `signs`.

    ValueError, before anything is changed, for bits out of range, models that are quantized or fused already, have
    nothing to quantize, or whose forward cannot be traced.
    """
    for name, bits in (
        ("weight_bits", weight_bits), ("activation_bits", activation_bits), ("first_last_bits", first_last_bits)
    ):  # fmt: skip
        check_bits(name, bits)
    Quantizer(start_step=start_step)  # refuses what the layers' would
    _check_model(model)
    found = convolutions(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has nothing to quantize: no {', '.join(t.__name__ for t in TWINS)} is called in it"
        )
    for conv in found:
        _check_padding(conv.module)
    in_order = [conv.module for conv in found if conv.like is None]
    for conv in found:
        is_end = (conv.like or conv.module) in (in_order[0], in_order[-1])
        bits = (first_last_bits, first_last_bits) if is_end else (weight_bits, activation_bits)
        become(conv.module, *bits, signed=conv.signed, start_step=start_step)
    return model


def _check_model(model):
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, Quantizer) or hasattr(module, "quantizer"):
            raise ValueError(f"{where} is quantized already: quantize a model of float layers")
        if is_fused(module):
            raise ValueError(f"{where} is fused: call rir_kernels.unfuse_(model) first")


def _check_padding(module):
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        raise ValueError(
            f"padding must be zeros, by numbers, got padding={module.padding!r}, padding_mode={module.padding_mode!r}: "
            "write the numbers, or pad in a module of its own"
        )
