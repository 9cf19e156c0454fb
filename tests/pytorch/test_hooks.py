"""Whatever is put on a bypassed submodule after fusing is seen at the next call, and costs that chain alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.pytorch.networks import (
    BLOCKS,
    CALLS,
    OPERATIONS,
    BasicBlock,
    OutOfPlaceBlock,
    images,
    resnet,
    resnet_twins,
    twins,
)  # fmt: skip
from tests.support.surgery_helpers import (
    CONV_CHANGES,
    NORM_CHANGES,
    RELU_CHANGES,
    Doubled,
    assert_same,
    fused_calls,
    randn,
    settle,
    step,
)  # fmt: skip

# submodule -> how many of the six operations give way: a block's one ReLU ends two chains
BYPASSED = {"layer1.0.conv1": 1, "layer2.0.bn2": 1, "layer2.0.downsample.1": 1, "bn1": 1, "relu": 1, "layer1.0.relu": 2}
PLAIN_CONV, PLAIN_NORM, PLAIN_RELU = nn.Conv2d, nn.BatchNorm2d, nn.ReLU


def changes(path):
    known = {PLAIN_CONV: CONV_CHANGES, PLAIN_NORM: NORM_CHANGES, PLAIN_RELU: RELU_CHANGES}
    return known[type(resnet().get_submodule(path))]


@pytest.mark.parametrize(("path", "change"), [(path, change) for path in BYPASSED for change in changes(path)])
def test_only_its_chain_gives_way(path, change):
    # a backward hook makes a view of the output, which nothing may then change in place: torch refuses it
    fused, original = resnet_twins(OutOfPlaceBlock if "backward" in change else BasicBlock)
    for model in (fused, original):
        changes(path)[change](model.get_submodule(path))
    assert_same(fused, original, images(), calls=OPERATIONS - BYPASSED[path])


@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook", "backward hook", "backward pre-hook"])
def test_hooks_on_units_run_and_the_unit_stays_fused(kind):
    fused, original = resnet_twins(OutOfPlaceBlock)
    for model in (fused, original):
        for unit in (model, model.layer1, model.layer1[0], model.layer2[0].downsample):
            NORM_CHANGES[kind](unit)
    assert_same(fused, original, images(), calls=OPERATIONS)


def test_a_removed_hook_is_forgotten():
    fused, original = resnet_twins()
    seen = []
    handle = fused.layer1[0].bn1.register_forward_hook(lambda *_: seen.append(1))
    assert_same(fused, original, images(), calls=OPERATIONS - 1)
    handle.remove()
    assert_same(fused, original, images(), calls=OPERATIONS)
    assert len(seen) == 1


GLOBAL_HOOKS = {
    "forward": nn.modules.module.register_module_forward_hook,
    "forward_pre": nn.modules.module.register_module_forward_pre_hook,
    "full_backward": nn.modules.module.register_module_full_backward_hook,
    "full_backward_pre": nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_hooks_on_all_modules_see_all_modules(kind):
    fused, original = resnet_twins(OutOfPlaceBlock)
    seen = {fused: [], original: []}
    for model, calls in seen.items():
        handle = GLOBAL_HOOKS[kind](
            lambda module, *_, calls=calls: calls.append(type(module).__name__.replace("Fused", ""))
        )
        try:
            with fused_calls(0):
                step(model, images())
        finally:
            handle.remove()
    assert seen[fused] == seen[original] and seen[original].count("BatchNorm2d") == OPERATIONS
    assert_same(fused, original, images(), calls=OPERATIONS)


REPARAMETRIZED = {
    "parametrization": lambda conv: parametrize.register_parametrization(conv, "weight", Doubled()),
    "weight_norm": lambda conv: parametrizations.weight_norm(conv),
    "orthogonal": lambda conv: parametrizations.orthogonal(conv),
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
}


@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_weights_that_are_computed(kind):
    """Applied after fusing the convolution is called as it is; taken away, its chain is fused again."""
    fused, original = resnet_twins()
    for model in (fused, original):
        torch.manual_seed(3)  # orthogonal draws
        REPARAMETRIZED[kind](model.layer2[0].conv2)
    assert_same(fused, original, images(), calls=OPERATIONS - 1)
    for model in (fused, original):
        conv = model.layer2[0].conv2
        prune.remove(conv, "weight") if kind == "pruned" else parametrize.remove_parametrizations(conv, "weight")
    assert_same(fused, original, images(), calls=OPERATIONS)


def test_the_deprecated_weight_norm():
    fused, original = resnet_twins()
    for model in (fused, original):
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(model.layer1[0].conv1)
    assert_same(fused, original, images(), calls=OPERATIONS - 1)


@pytest.mark.parametrize("name", ["ResUnit", "PreResUnit", "RiRUnit"])
def test_blocks_of_pytorchcv(name):
    fused, original = twins(settle(BLOCKS[name]()))
    x = randn(2, 4, 6, 6)
    for path, module in original.named_modules():
        if not isinstance(module, nn.BatchNorm2d):
            continue
        ours, theirs = copy.deepcopy(fused), copy.deepcopy(original)
        seen = []
        for model in (ours, theirs):
            model.get_submodule(path).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        assert_same(ours, theirs, x, calls=CALLS[name] - 1)
        assert len(seen) == 2


@pytest.mark.parametrize("name", ["RiRBlock", "ConvBNAct"])
def test_hooks_on_what_our_modules_own_do_not_run(name):
    """conv, bn and the layers' weights hold parameters: our own modules never call them, hooks or not."""
    module, seen = settle(BLOCKS[name]()), []
    for m in module.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.Conv2d)):
            m.register_forward_hook(lambda *_: seen.append(1))
    module(randn(2, 4, 6, 6))
    assert not seen


def test_parametrizations_of_what_our_modules_own():
    layer, unit = settle(BLOCKS["RiRBlock"]()).layers[0], settle(BLOCKS["ConvBNAct"]())
    x = randn(2, 4, 6, 6)
    for module, owner in ((layer, layer), (unit, unit.conv)):
        doubled = copy.deepcopy(module)
        with torch.no_grad():
            (doubled if owner is module else doubled.conv).weight.mul_(2)
        parametrize.register_parametrization(owner, "weight", Doubled())
        assert torch.equal(module(x), doubled(x))
