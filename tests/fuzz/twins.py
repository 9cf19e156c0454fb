"""A drawn module and its fused twin, each from a separate source, called, changed and called again: all is the same.

Both run torch's operators in fp64, so outputs, inputs and statistics are compared bit by bit. Gradients are not: where
a tensor is used several times autograd adds up in the order of the operations, and fusing moves some of them. They may
differ by a rounding of the largest, enlarged by norms: fp64's 2e-16 stays below TOLERANCE, and a mistake is above 1e-3.
"""

import contextlib
import functools
import itertools
import linecache
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rir_kernels.surgery import fold_bn_, fuse_, unfuse_
from tests.support.surgery_helpers import randn

TOLERANCE = 1e-9
_numbers = itertools.count()


def check_forward(text: str) -> None:
    """AssertionError, with the text, where the fused twin differs, or fusing leaves something behind."""
    try:
        with _module(text) as plain, _module(text) as module:
            original, fused = _build(plain), _build(module)
            with _no_effect(fused, module):
                fuse_(fused, impl="torch", dry_run=True)
            with _no_effect(fused, module, classes=False):
                report = fuse_(fused, impl="torch")
            check_seen(report)
            expected, found = _calls(original, plain), _calls(fused, module)
            for i, (one, other) in enumerate(zip(expected, found, strict=True)):
                _compare(f"call {i}", one, other)
            with _no_effect(fused, module, classes=False):
                unfuse_(fused)
            assert [type(m).__name__ for m in fused.modules()] == [type(m).__name__ for m in original.modules()]
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n\n{text}") from error


def check_fold(text: str) -> None:
    """AssertionError, with the text, where fold_bn_ changes outputs in evaluation, or says nothing about a norm.

    The folded weights are rounded to fp64 once more: see TOLERANCE.
    """
    try:
        with _module(text) as plain, _module(text) as module:
            original, folded = _build(plain).eval(), _build(module).eval()
            norms = [name for name, found in folded.named_modules() if isinstance(found, _NormBase)]
            with _no_effect(folded, module):
                report = fold_bn_(folded, dry_run=True)
            assert len(report.replaced) + len(report.skipped) == len(norms), f"of {norms} the report has {report}"
            fold_bn_(folded)
            for extra in ((), (randn(2, 4, 6, 6, seed=1),), ()):
                expected, found = (_output(model, randn(2, 4, 6, 6), *extra) for model in (original, folded))
                _compare(f"folded, {len(extra)} options", expected, found)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n\n{text}") from error


def check_seen(report) -> None:
    """AssertionError where a Conv2d, or a norm with statistics, is neither fused nor an entry in report.skipped."""
    seen = {name for item in report.skipped for name in (item.name, *item.also)}
    fused = {
        f"{name}.{part}".strip(".")
        for item in report.replaced
        for name in (item.name, *item.also)
        for part in item.parts
    }
    names: dict[nn.Module, list[str]] = {}
    for name, module in report.model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d) or (isinstance(module, _NormBase) and module.running_mean is not None):
            names.setdefault(module, []).append(name)
    for known in names.values():
        assert not (seen | fused).isdisjoint(known), f"nothing is said about {known[0]}: {report}"


@contextlib.contextmanager
def _module(text):
    """The text, imported."""
    name = f"drawn_{next(_numbers)}"
    module = sys.modules[name] = types.ModuleType(name)
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module.doubled = _doubled
    try:
        exec(compile(text, name, "exec"), module.__dict__)
        module.Net.dtype = torch.float64
        yield module
    finally:
        del sys.modules[name], linecache.cache[name]


def _doubled(method):
    return lambda *args, **kwargs: 2 * method(*args, **kwargs)


def _build(module):
    torch.manual_seed(0)
    model = module.Net().double()
    for tensor in model.state_dict().values():  # norms that are neither fresh nor alike
        if tensor.dim() == 1:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model


def _calls(model, module):
    """What each of some calls does. The classes of torch that the module patches are put back."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        module.patch = functools.partial(monkeypatch.setattr, raising=False)
        return list(_run(model, module))


def _run(model, module):
    """In training and evaluation, with the optional argument, and after each change."""
    x, z = randn(2, 4, 6, 6), randn(2, 4, 6, 6, seed=1)
    for training, options in ((True, {}), (False, {}), (True, {"z": z})):
        yield _call(model.train(training), x, **options)
    with torch.no_grad():
        yield _call(model, x.contiguous(memory_format=torch.channels_last))
    model.train()
    for name in ("change_0", "change_1"):
        if hasattr(module, name):
            try:
                model = getattr(module, name)(model)
            except Exception as error:
                yield {"the change": type(error)}
                continue
            for training in (True, False):
                yield _call(model, x)
                if training:
                    model.eval()
            model.train()


def _call(model, x, **options):
    """{what: tensor or something to compare} of a forward and backward; of one that raises only the kind of error."""
    leaf = x.clone().requires_grad_(torch.is_grad_enabled())
    torch.manual_seed(1)
    model.zero_grad()
    x = leaf * 1  # so that it may be changed in place
    try:
        y = model(x, **options)
    except Exception as error:
        return {"the forward": type(error)}
    outputs = y if isinstance(y, tuple) else (y,)
    found = {f"output {i}": out.detach().clone() for i, out in enumerate(outputs)}
    found |= {f"strides of output {i}": out.stride() for i, out in enumerate(outputs)}
    found |= {"x afterwards": x.detach().clone()}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = sum((out * randn(*out.shape, seed=i)).sum() for i, out in enumerate(outputs, 10))
    found["differentiable"] = loss.requires_grad
    if loss.requires_grad:
        try:
            loss.backward()
        except RuntimeError as error:
            return found | {"backward": type(error)}
        found |= {"gradient of x": leaf.grad}
        found |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    for name, child in model.named_modules():
        plain = {key: value for key, value in vars(child).items() if isinstance(value, bool | int | float | str)}
        found[f"attributes of {name}"] = plain
    return found


@torch.no_grad()
def _output(model, *inputs):
    torch.manual_seed(1)
    try:
        y = model(*inputs)
    except Exception as error:
        return {"the forward": type(error)}
    return {f"output {i}, folded": out for i, out in enumerate(y if isinstance(y, tuple) else (y,))}


def _compare(where, expected, found):
    if "backward" in expected and "backward" not in found:
        # what forward has changed in place and a module has kept for backward: a fused operation keeps less
        found = {name: value for name, value in found.items() if name in expected} | {"backward": expected["backward"]}
    assert found.keys() == expected.keys(), f"{where}: {sorted(found.keys() ^ expected.keys())}"
    for name, value in expected.items():
        other = found[name]
        if not isinstance(value, torch.Tensor):
            assert type(other) is type(value) and other == value, f"{where}, {name}: {other}, expected {value}"
            continue
        assert isinstance(other, torch.Tensor), f"{where}, {name}: {other}"
        size = value.abs().max().item() if value.is_floating_point() and value.numel() else 0.0
        atol = TOLERANCE * max(1.0, size) if name.startswith("gradient") or name.endswith("folded") else 0.0
        torch.testing.assert_close(
            other, value, rtol=0, atol=atol, equal_nan=True, msg=lambda text, name=name: f"{where}, {name}: {text}"
        )


@contextlib.contextmanager
def _no_effect(model, module, classes=True):
    """Nothing of the model or its source is another afterwards."""
    before = _state(model, module, classes)
    yield
    after = _state(model, module, classes)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name] == value, f"fusing changes {name}: {after[name]}, before {value}"


def _state(model, module, classes):
    found = {
        f"global {name}": _written(value)
        for name, value in vars(module).items()
        if name not in ("__builtins__", "patch")
    }
    for kind in [value for value in vars(module).values() if isinstance(value, type)]:
        found |= {f"{kind.__name__}.{name}": id(value) for name, value in vars(kind).items() if name != "__dict__"}
    for name, child in model.named_modules(remove_duplicate=False):
        own = vars(child)
        found |= {f"{name}.{key}": _written(value) for key, value in own.items()}
        if classes:
            found[f"class of {name}"] = type(child)
    return found


def _written(value):
    """A text that is another one after any change, of a module which one it is."""
    if isinstance(value, torch.Tensor):
        return str((id(value), value.tolist(), value._version))
    if isinstance(value, dict):
        return str([(key, _written(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return str(list(map(_written, value)))
    return str(id(value)) if isinstance(value, nn.Module) else repr(value)
