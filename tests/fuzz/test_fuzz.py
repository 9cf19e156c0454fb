"""The operation on whatever is drawn, against fp64. A failure is made small, and ends with a command for it.

HYPOTHESIS_PROFILE=long draws 2,000 calls for "torch" and 300 for "triton", and a quarter as many layers and blocks,
other ones every time; else a few that are always the same.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.support.emulation import gpu

from .cases import Case, cases
from .judge import check, use_test_settings
from .layers import LayerCase, check_layer, layer_cases

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": not LONG, "database": None}


@settings(max_examples=2000 if LONG else 150, **SETTINGS)
@given(cases("torch"))
def test_torch(case):
    check(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=300 if LONG else 20, **SETTINGS)
@given(cases("interpreter"))
def test_triton_in_the_interpreter(case):
    check(case, "triton")


@settings(max_examples=500 if LONG else 40, **SETTINGS)
@given(layer_cases("torch"))
def test_layers_by_torch(case):
    check_layer(case, "torch")


@pytest.mark.interpreter
@settings(max_examples=75 if LONG else 5, **SETTINGS)
@given(layer_cases("interpreter"))
def test_layers_in_the_interpreter(case):
    check_layer(case, "triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("factor", [-1.5, 0.0])
def test_a_factor_after_the_norm_that_is_not_positive(factor, training):
    """Found by drawing: it turns the sign that the ReLU's gradient depends on."""
    check(
        Case(
            batch=2, size=(6, 7), channels=(3, 5), kernel=3, stride=1, padding=0, residuals=(), residual_at="post_norm",
            branch_scale=factor, bias=False, affine="both", statistics=True, training=training, momentum=0.1, eps=1e-5,
            activation="relu", dtype="float32", fp32_norm=False, layouts=("contiguous",) * 4,
            wanted=("x", "weight", "bn_weight", "bn_bias"), seed=0,
        ),
        "triton",
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "hybrid", "triton"])
def test_on_a_gpu(impl):
    use_test_settings()
    drawn = "torch" if impl == "torch" else "gpu"

    @settings(max_examples=1000 if LONG else 100, **SETTINGS)
    @given(cases(drawn))
    def run(case):
        check(case, impl, gpu().type)

    @settings(max_examples=250 if LONG else 25, **SETTINGS)
    @given(layer_cases(drawn))
    def run_layers(case):
        check_layer(case, impl, gpu().type)

    run()
    run_layers()


def test_a_failure_ends_with_a_command(monkeypatch):
    """Broken on purpose: the command at the end of the message is the call that was made."""
    from rir_kernels import functional

    right = functional.conv_bn_act
    monkeypatch.setattr(functional, "conv_bn_act", lambda *args, **options: right(*args, **options) * 1.01)

    @settings(max_examples=20, **SETTINGS)
    @given(cases("torch"))
    def run(case):
        check(case, "torch")

    with pytest.raises(AssertionError, match=r"y: error .*\nagain: python -m tests.fuzz torch cpu '") as failure:
        run()
    text = str(failure.value).split("again: python -m tests.fuzz torch cpu ")[1].strip().strip("'")
    case = Case.from_text(text)
    assert case.batch == 1  # made small
    with pytest.raises(AssertionError, match=r"y: error"):
        check(case, "torch")
    monkeypatch.undo()
    check(case, "torch")


def test_a_layer_that_is_wrong(monkeypatch):
    """Broken on purpose: the transient stream comes twice."""
    from rir_kernels import modules

    right = modules.join
    monkeypatch.setattr(modules, "join", lambda r, t: right(r, t) if r.shape != t.shape else right(t, t))

    @settings(max_examples=40, phases=[Phase.generate], **SETTINGS)
    @given(layer_cases("torch"))
    def run(case):
        check_layer(case, "torch")

    with pytest.raises(AssertionError, match="NOT EQUIVALENT") as failure:
        run()
    case = LayerCase.from_text(str(failure.value).split("again: python -m tests.fuzz torch cpu ")[1].strip().strip("'"))
    with pytest.raises(AssertionError, match="NOT EQUIVALENT"):
        check_layer(case, "torch")
    monkeypatch.undo()
    check_layer(case, "torch")
