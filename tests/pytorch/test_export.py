"""Fused models leave Python: torch.export, AOTInductor, torch.jit.trace. fp64; tolerance as in surgery_helpers."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

import rir_kernels as rir
from tests.pytorch.networks import BLOCKS, BasicBlock, images, resnet_twins
from tests.support.surgery_helpers import CLOSE, randn, settle

BATCH = torch.export.Dim("batch", min=2, max=64)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:copyreg", "ignore::DeprecationWarning:torch")


@functools.cache
def exported(training, strict):
    """(the program with a dynamic batch, the unfused model)"""
    fused, original = (model.train(training) for model in resnet_twins())
    program = torch.export.export(fused, (images(),), dynamic_shapes={"x": {0: BATCH}}, strict=strict)
    return program, original


def reloaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    return torch.export.load(io.BytesIO(file.getvalue()))


FORMS = {
    "as it is": lambda program: program,
    "decomposed": lambda program: program.run_decompositions(),
    "saved": reloaded,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_export_of_blocks(name):
    original = settle(BLOCKS[name]()).eval()
    fused, x = copy.deepcopy(original), randn(3, 4, 6, 6)
    rir.fuse_(fused)
    program = torch.export.export(fused, (randn(2, 4, 6, 6),), dynamic_shapes=[{0: BATCH}])
    torch.testing.assert_close(program.module()(x), original(x), **CLOSE)


@pytest.mark.interpreter
def test_the_kernels_are_ops_of_the_program():
    unit, x = rir.ConvBNAct(4, 4, 3, impl="triton").eval(), randn(3, 4, 6, 6).float()
    program = torch.export.export(unit, (x[:2],), dynamic_shapes={"x": {0: BATCH}})
    assert sum("rir_kernels.conv_bn_act" in str(node.target) for node in program.graph.nodes) == 1
    with torch.no_grad():
        assert torch.equal(program.module()(x), unit(x))


@pytest.mark.long  # a C++ compiler is at work
def test_row_38_aot_inductor(tmp_path):
    """A fused model as a package of machine code, for other batches too."""
    torch.manual_seed(0)
    original = settle(nn.Sequential(BasicBlock(4, 4))).eval()
    fused = copy.deepcopy(original)
    assert len(rir.fuse_(fused).replaced) == 2
    program = torch.export.export(fused, (randn(2, 4, 8, 8),), dynamic_shapes=[{0: BATCH}])
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    x = randn(5, 4, 8, 8)
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), original(x), **CLOSE)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are compared, and checked, in Python
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_jit_trace(training):
    """Works for other batches too; what is checked of sizes is checked while tracing alone, and torch warns of that."""
    fused, original = (model.train(training) for model in resnet_twins())
    traced = torch.jit.trace(copy.deepcopy(fused), (images(),), check_trace=False)
    traced.load_state_dict(original.state_dict())
    x = images(5)
    torch.testing.assert_close(traced(x), original(x), **CLOSE)
    for name, buffer in traced.named_buffers():
        torch.testing.assert_close(buffer, original.get_buffer(name), **CLOSE)
