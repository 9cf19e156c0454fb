"""compare: is one module the same function as another, in its values, its gradients and its running statistics?

Here the modules are run; `equivalence_criterion` says by what the results are judged, and why.
"""

import contextlib
import copy
import dataclasses

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .dispatch import use_impl
from .equivalence_criterion import GRADIENTS, is_floating, judge_all
from .equivalence_report import EquivalenceReport
from .modules import ConvBNAct, RiRLayer
from .surgery.swap import is_covered, is_fused, swap_in


def compare(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: torch.Tensor | tuple[torch.Tensor | None, ...],
    *,
    train: bool = True,
) -> EquivalenceReport:
    """Outputs, input gradients, parameter gradients and buffers of `candidate` against `reference`.

    Args:
        reference: any module; its fp64 copy is the golden.
        candidate: a module with the same weights under the same names, where RiRLayers, on either side, count as what
            their to_reference() gives.
        inputs: what forward takes, a tensor or a tuple, of any dtype and shape. The floating ones get gradients.
        train: compare in training mode, where running statistics move, or in eval mode, where they must not.

    Works on copies: modules, gradients, buffers, inputs, training flags and torch's random state are left as they were.
    Each run starts from the same seed, its backward from the same random cotangent. Outputs may be any pytree of
    tensors; integers and booleans in it must be equal, and so must what is not a tensor.

    A name that only one side has fails the report, and so do unlike structures, shapes and dtypes. A missing gradient
    counts as zeros: where the reference has none (a frozen or unused parameter), the candidate has none, or zeros.

    Returns a report that is true where every row passed; print it, or leave it to a notebook. How rows are judged, and
    why so, stands at the top of `equivalence_criterion`.

    Raises TypeError where an argument or an output is of another type, RuntimeError where the modules are on different
    devices, and what the modules themselves raise.
    """
    inputs = _check(reference, candidate, inputs)
    with _undisturbed():
        given = [_run(reference, inputs, train)]
        if not given[0].is_random:  # in the other format random numbers would fall on other elements
            given += _run_in_other_format(reference, inputs, train)
        result = _run(candidate, inputs, train)

        golden = _golden(reference)
        widened = tuple(x.double() if is_floating(x) else x for x in inputs)
        with use_impl("torch"):
            exact = _run(golden, widened, train)
            rows = judge_all(given, exact, result)
            if any(row.kind in GRADIENTS and not row.passed and row.budget is not None for row in rows):
                amount = _amount(reference, inputs, given[0])
                moved = [
                    _run(*_moved(golden, widened, sign * amount, seed), train) for seed in (1, 2) for sign in (1, -1)
                ]
                rows = judge_all(given, exact, result, moved)
        before = _named(copy.deepcopy(reference)), _named(copy.deepcopy(candidate))
    if not train:
        rows = [_check_unmoved(row, before, (given[0].tensors, result.tensors)) for row in rows]
    return EquivalenceReport(tuple(_explain(row, *before) for row in rows), train)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What one forward and backward left: tensors by (kind, name), and how the outputs were nested."""

    tensors: dict
    structure: pytree.TreeSpec
    is_random: bool  # whether random numbers were drawn


def _is_tensor(x):
    return isinstance(x, torch.Tensor)


def _check(reference, candidate, inputs):
    for name, module in (("reference", reference), ("candidate", candidate)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    devices = [sorted({str(t.device) for t in (*m.parameters(), *m.buffers())}) for m in (reference, candidate)]
    if all(devices) and devices[0] != devices[1]:
        raise RuntimeError(
            f"reference and candidate must be on the same device, got {devices[0]} and {devices[1]}: "
            "move one with .to(device)"
        )
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    if not isinstance(inputs, tuple) or not all(x is None or isinstance(x, torch.Tensor) for x in inputs):
        got = type(inputs).__name__
        if isinstance(inputs, tuple):
            got = f"a tuple of {', '.join(type(x).__name__ for x in inputs)}"
        raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {got}: pass forward's arguments, (x, ...)")
    return inputs


@contextlib.contextmanager
def _undisturbed():
    """Gradients are on whatever the caller set, and torch's random state is given back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices):
        yield


def _seed(seed):
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # torch.manual_seed would leave a seed behind for when it is
        torch.cuda.manual_seed_all(seed)


def _random_states():
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _run(module, inputs, train) -> _Run:
    """Forward and backward of a copy, from the same seed and the same cotangent as every other run."""
    module = copy.deepcopy(module)
    module.train(train)
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) if _is_tensor(x) else x for x in inputs]
    _seed(0)
    states = _random_states()
    # forward gets clones: a leaf cannot be changed in place, as a module may do that starts with nn.ReLU(inplace=True)
    outputs = module(*[x.clone() if _is_tensor(x) else x for x in leaves])
    is_random = not all(map(torch.equal, states, _random_states()))
    nested, structure = pytree.tree_flatten_with_path(outputs)
    outputs = {("output", f"output{pytree.keystr(path)}"): leaf for path, leaf in nested}
    for leaf in outputs.values():
        if not (leaf is None or isinstance(leaf, (torch.Tensor, bool, int, float, str))):
            raise TypeError(
                f"forward must return tensors, or tuples, lists and dicts of them, got a {type(leaf).__name__}: "
                "wrap the module in one that does"
            )
    tensors = {key: leaf.detach().clone() if _is_tensor(leaf) else leaf for key, leaf in outputs.items()}

    roots = [leaf for leaf in outputs.values() if _is_tensor(leaf) and leaf.requires_grad]
    if roots:
        torch.autograd.backward(roots, [_cotangent(root, seed) for seed, root in enumerate(roots)])
    for i, leaf in enumerate(leaves):
        if is_floating(leaf):
            name = "input" if len(leaves) == 1 else f"input[{i}]"
            tensors["input grad", name] = _gradient(leaf)
    for parameter in module.parameters():  # to_reference() then does to gradients what it does to weights
        parameter.data = _gradient(parameter)
    return _Run(tensors | _named(module), structure, is_random)


def _run_in_other_format(module, inputs, train):
    """The run with images and weights channels_last instead of contiguous, or the reverse; none where there are none.

    On a CPU without oneDNN: its gradient of a strided 1x1 writes past its workspace where channels_last images have few
    channels (uxlfoundation/oneDNN#6035), and this is not the format that the caller chose.
    """
    module = copy.deepcopy(module)
    images = [x for x in inputs if is_floating(x) and x.dim() == 4]
    weights = [parameter for parameter in module.parameters() if parameter.dim() == 4]
    if not (images or weights):
        return []
    other = torch.channels_last if all(x.is_contiguous() for x in images) else torch.contiguous_format
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=other)
    inputs = [x.contiguous(memory_format=other) if is_floating(x) and x.dim() == 4 else x for x in inputs]
    try:
        with _no_onednn():
            return [_run(module, inputs, train)]
    except RuntimeError:  # some modules take one format only: .view() after a convolution does
        return []


@contextlib.contextmanager
def _no_onednn():
    # and no NNPACK, which would take over for large batches and give contiguous images back
    onednn = torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None, fp32_precision=None)
    with onednn, torch.backends.nnpack.flags(enabled=False):
        yield


def _golden(reference):
    """A copy in float64. The kernels do not take that, so what asks for them by name gets "torch"."""
    golden = copy.deepcopy(reference).double()
    for module in golden.modules():
        if isinstance(module, (RiRLayer, ConvBNAct)):
            module.impl = "torch"
        elif is_fused(module) and not is_covered(module):
            swap_in(module, dataclasses.replace(module._rir_fusion, impl="torch"))
    return golden


def _cotangent(output, seed):
    # odd multiples of 1/8, from -15/8 to 15/8: never zero, and the same numbers in every dtype
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randint(16, output.shape, generator=generator) - 7.5) / 4).to(output)


def _gradient(leaf):
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach()


def _named(module):
    """Parameters (as "param grad") and buffers by kind and name, packed layers taken apart; uses the module up."""
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if isinstance(layer, RiRLayer):
            if not name:
                module = layer.to_reference()
                break
            module.set_submodule(name, layer.to_reference())
    named = {("param grad", name): p.detach() for name, p in module.named_parameters(remove_duplicate=False)}
    return named | {("buffer", name): b for name, b in module.named_buffers(remove_duplicate=False)}


def _amount(reference, inputs, run):
    """How far weights and inputs are moved, relatively, to see what gradients do within rounding.

    Farther than one rounding: of the few elements whose mask may fall either way, none is to be missed. In 16 bits they
    are many more, and as many roundings would leave nothing of the gradients.
    """
    tensors = [*reference.parameters(), *inputs, *run.tensors.values()]
    eps = max(torch.finfo(t.dtype).eps for t in tensors if is_floating(t))
    return (4 if eps > 2**-16 else 32) * eps


@torch.no_grad()
def _moved(golden, inputs, amount, seed):
    """(golden, inputs), every parameter and input moved by about `amount` of itself, up or down by chance."""
    _seed(seed)
    golden = copy.deepcopy(golden)

    def move(x):
        return x * (1 + amount * torch.randn_like(x))

    for parameter in golden.parameters():
        parameter.copy_(move(parameter))
    return golden, tuple(move(x) if is_floating(x) else x for x in inputs)


def _check_unmoved(row, before, after):
    """In eval mode: a buffer that the reference leaves as it is, the candidate leaves as it is."""
    key = (row.kind, row.name)
    if row.kind != "buffer" or not row.passed or key not in before[0]:
        return row
    (reference, candidate), (reference_after, candidate_after) = (
        [state[key] for state in pair] for pair in (before, after)
    )
    if torch.equal(candidate, candidate_after) or not torch.equal(reference, reference_after):
        return row
    return dataclasses.replace(row, passed=False, note="changed in eval mode")


def _explain(row, reference, candidate):
    """A failed row whose tensor differed before the run says so: it is the commonest reason."""
    ours, theirs = (state.get((row.kind, row.name)) for state in (candidate, reference))
    if row.passed or ours is None or theirs is None or ours.shape != theirs.shape or torch.equal(ours, theirs.to(ours)):
        return row
    what = "weights" if row.kind == "param grad" else "values"
    return dataclasses.replace(row, note=f"the {what} differed before the run; {row.note}".removesuffix("; "))
