"""States and checkpoints that do not fit, or that somebody made up.

The number in a test's name is that of the fault in docs/faults.md.
"""

import copy
import json
import os
import pickle
import struct
from math import prod

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.training import build, checkpoint
from models.training.errors import CheckpointError
from tests.pytorch.networks import BLOCKS, resnet, resnet_twins
from tests.support.hostile import Executed
from tests.support.surgery_helpers import settle

# 49: state


def test_row_49_state_that_does_not_fit_a_fused_model():
    """Same errors, same lists of keys as without fuse_."""
    state = resnet().state_dict()
    state["extra"] = state.pop("layer1.0.conv1.weight")
    errors = []
    for model in resnet_twins():
        with pytest.raises(RuntimeError, match=r"Missing key.*conv1") as error:
            model.load_state_dict(state)
        errors.append(str(error.value).partition("\n")[2])
        assert model.load_state_dict(state, strict=False) == (["layer1.0.conv1.weight"], ["extra"])
        with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):
            model.load_state_dict({"conv1.weight": torch.zeros(1, 3, 3, 3)}, strict=False)
    assert errors[0] == errors[1]


@pytest.mark.parametrize("name", ["resnet", "RiRBlock", "ConvBNAct"])
def test_row_49_state_from_before_batches_were_counted(name):
    """nn.BatchNorm2d knows them by the version in the metadata, or by its absence; the counters stay as they are."""
    model = resnet_twins()[0] if name == "resnet" else settle(BLOCKS[name]())
    current = copy.deepcopy(model.state_dict())
    old = type(current)((key, value) for key, value in current.items() if not key.endswith("tracked"))
    old._metadata = current._metadata
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        model.load_state_dict(old)  # with today's metadata
    aged = {path: versions | {"version": 1} for path, versions in current._metadata.items()}
    for metadata in (aged, None):
        old._metadata = metadata
        assert model.load_state_dict(old) == ([], [])
        for key, value in current.items():
            assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["RiRBlock", "ConvBNAct"])
def test_row_49_state_that_does_not_fit_our_modules(name):
    """torch's errors and lists of keys, and nothing is loaded under strict."""
    module = BLOCKS[name]()
    key = next(key for key in module.state_dict() if key.endswith("bn.running_var"))
    state = copy.deepcopy(module.state_dict())
    state["extra"] = state.pop(key)
    with pytest.raises(RuntimeError, match=rf"(?s)Missing key.*{key}.*Unexpected key.*extra"):
        module.load_state_dict(state)
    assert module.load_state_dict(state, strict=False) == ([key], ["extra"])
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
        module.load_state_dict({key: torch.zeros(1)}, strict=False)


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ["RiRBlock", "ConvBNAct"])
def test_row_49_casts_are_those_of_a_batch_norm(name, cast):
    """Floats are cast, the counter stays int64, and a state in another dtype is cast as it is loaded."""
    module, norm = settle(BLOCKS[name]()).float(), nn.BatchNorm2d(4)
    state = copy.deepcopy(module.state_dict())
    CASTS[cast](module), CASTS[cast](norm)
    dtypes = {key: t.dtype for key, t in norm.state_dict().items()}
    for key, tensor in module.state_dict().items():
        assert tensor.dtype == dtypes.get(key.rpartition(".")[2], dtypes["weight"])
        assert torch.equal(tensor, state[key].to(tensor.dtype)), key
        assert tensor.dim() < 4 or cast != "channels_last" or tensor.is_contiguous(memory_format=torch.channels_last)
    doubled = {key: 2 * t for key, t in state.items()}
    module.load_state_dict(doubled)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, doubled[key].to(tensor.dtype)) and tensor.dtype == dtypes.get(
            key.rpartition(".")[2], dtypes["weight"]
        )


# 50: checkpoints of somebody else

DESCRIPTION = {
    "name": "rir18_thin", "num_classes": 10, "in_channels": 1, "options": {"depth": [1, 1, 1]}, "quantize": None,
    "dtype": "float32", "layers": "packed",
}  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    return build.sectioned("model", build.network(DESCRIPTION).state_dict())


class _Watched(TorchDispatchMode):
    """Notes, and refuses, what takes more than 4 MiB."""

    def __init__(self):
        super().__init__()
        self.large = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "empty" in operator.name() and str(kwargs.get("device")) != "meta":
            size = args[0] if isinstance(args[0], (list, tuple)) else args[0].shape
            if prod(size) > 2**20:
                self.large.append((operator.name(), size))
                raise MemoryError(size)
        return operator(*args, **kwargs)


def _rejected(path, match):
    with _Watched() as watched, pytest.raises(CheckpointError, match=match):
        build.load(path)
    assert not watched.large


def test_row_50_a_good_checkpoint_is_loaded(tmp_path, weights):
    """What the others are rejected beside; bit for bit."""
    checkpoint.save(tmp_path / "file", weights, {"model": DESCRIPTION})
    model, _ = build.load(tmp_path / "file")
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[f"model.{name}"])


NO_NETWORK, ANOTHER = "no network can be built", "a checkpoint of another model"
OVERSIZED = {
    "classes": ({"num_classes": 10**8}, ANOTHER), "more classes than numbers": ({"num_classes": 10**30}, NO_NETWORK),
    "channels": ({"in_channels": 10**8}, ANOTHER), "the wide one": ({"name": "rir18_wide"}, ANOTHER),
    "blocks": ({"options": {"depth": [10**9, 1, 1]}}, NO_NETWORK),
    "a block too many": ({"options": {"depth": [2, 1, 1]}}, ANOTHER),
    "layers": ({"options": {"depth": [1, 1, 1], "layers_per_block": 10**9}}, NO_NETWORK),
    "depth of another type": ({"options": {"depth": "aaa"}}, NO_NETWORK),
    "options of another type": ({"options": [1]}, NO_NETWORK), "unknown option": ({"options": {"x": 1}}, NO_NETWORK),
    "name of another type": ({"name": ["rir18_thin"]}, NO_NETWORK), "a path": ({"name": "../../x"}, NO_NETWORK),
    "a function for a dtype": ({"dtype": "load"}, NO_NETWORK), "no such dtype": ({"dtype": "x"}, NO_NETWORK),
    "negative": ({"num_classes": -1}, NO_NETWORK), "not a number": ({"num_classes": float("nan")}, NO_NETWORK),
    "bits of another type": ({"quantize": 4}, NO_NETWORK), "no such bits": ({"quantize": "W9A9"}, NO_NETWORK),
    "another dtype": ({"dtype": "float64"}, ANOTHER), "missing": (None, NO_NETWORK), "a list": ([], NO_NETWORK),
}  # fmt: skip


@pytest.mark.parametrize("kind", OVERSIZED)
def test_row_50_what_it_says_of_the_network_is_not_believed(tmp_path, weights, kind):
    """A network that the tensors in the file are not those of is refused before it is built."""
    change, match = OVERSIZED[kind]
    facts = {"model": DESCRIPTION | change} if isinstance(change, dict) else {} if change is None else {"model": change}
    checkpoint.save(tmp_path / "file", weights, facts)
    _rejected(tmp_path / "file", match)


def _raw(path, header, data=b"", length=None, size=None):
    """A safetensors file as somebody may write it by hand; size: with a hole at its end."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    if size is not None:
        os.truncate(path, 8 + len(text) + size)


FACTS = json.dumps({"format": checkpoint.FORMAT, "model": DESCRIPTION})


def _header(shape, end, dtype="F32", start=0, **more):
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return {"__metadata__": {"rir_kernels": FACTS}, "model.x": tensor, **more}


HEADERS = {
    "length of an exabyte": ({"header": b"{}", "length": 2**60}, "not a whole"),
    "length of a gigabyte": ({"header": b"{}", "length": 2**30, "size": 2**30}, "not a whole"),
    "no JSON": ({"header": b"{" * 1000}, "not a whole"),
    "deep": ({"header": b"[" * 100_000}, "not a whole"),
    "shape beyond the data": ({"header": _header([2**40], 4), "data": b"abcd"}, "not a whole"),
    "data beyond the file": ({"header": _header([2**40], 2**42), "data": b"abcd"}, "not a whole"),
    "shape that overflows": ({"header": _header([2**62, 2**62], 4), "data": b"abcd"}, "not a whole"),
    "negative shape": ({"header": _header([-1], 4), "data": b"abcd"}, "not a whole"),
    "negative start": ({"header": _header([2], 4, start=-4), "data": b"abcd"}, "not a whole"),
    "shape of another type": ({"header": _header("aa", 4), "data": b"abcd"}, "not a whole"),
    "unknown type": ({"header": _header([1], 4, "OBJECT"), "data": b"abcd"}, "not a whole"),
    "type that no network has": ({"header": _header([4], 4, "F8_E4M3"), "data": b"abcd"}, "no network here has"),
    "deep facts": ({"header": {"__metadata__": {"rir_kernels": "[" * 100_000}}}, "but not one that"),
    "facts of 5000 digits": ({"header": {"__metadata__": {"rir_kernels": "1" * 5000}}}, "but not one that"),
    "facts of another type": ({"header": {"__metadata__": {"rir_kernels": 1}}}, "not a whole"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_row_50_headers_that_lie(tmp_path, kind):
    """Refused by the header alone."""
    raw, match = HEADERS[kind]
    _raw(tmp_path / "file", **raw)
    _rejected(tmp_path / "file", match)


@pytest.mark.parametrize("values", [2**26, 2**34])
def test_row_50_one_tensor_of_a_good_file_is_a_hole(tmp_path, weights, values):
    """Of 256 MiB, and of 64 GiB, which some systems map and others do not: told by the header, and never read."""
    header, end = {"__metadata__": {"rir_kernels": FACTS}}, 0
    names = {torch.float32: "F32", torch.int64: "I64"}
    for name, value in weights.items():
        shape = [values] if name == "model.head.conv.weight" else list(value.shape)
        start, end = end, end + prod(shape) * value.element_size()
        header[name] = {"dtype": names[value.dtype], "shape": shape, "data_offsets": [start, end]}
    _raw(tmp_path / "file", header, size=end)
    other = rf"another model: head\.conv\.weight is torch\.float32 \({values},\)"
    _rejected(tmp_path / "file", other if values == 2**26 else f"{other}|not a whole")


def test_row_50_pickles_are_not_looked_into(tmp_path):
    """Nothing of the file is executed."""
    torch.save({"model": Executed(tmp_path / "marker")}, tmp_path / "file")
    _rejected(tmp_path / "file", "not a whole safetensors file")
    (tmp_path / "file").write_bytes(pickle.dumps(Executed(tmp_path / "marker")))
    _rejected(tmp_path / "file", "not a whole safetensors file")
    assert not (tmp_path / "marker").exists()
