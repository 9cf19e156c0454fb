"""Drawn forwards, fused and not, before and after a change of the model: the same, to the bit where it can be.

HYPOTHESIS_PROFILE=long draws 2,000, other ones every time; else a few that are always the same.
"""

import pytest
from hypothesis import Phase, given, settings
from torch import nn

from rir_kernels.backends import aten
from rir_kernels.surgery import fuse_
from rir_kernels.surgery.report import FusionReport, Skipped

from . import twins
from .forwards import forwards
from .test_fuzz import LONG, SETTINGS


@settings(max_examples=2000 if LONG else 12, **SETTINGS)
@given(forwards())
def test_fused_and_unfused(text):
    twins.check_forward(text)


@settings(max_examples=500 if LONG else 8, **SETTINGS)
@given(forwards())
def test_folded_and_not(text):
    twins.check_fold(text)


def test_what_nothing_is_said_about():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    twins.check_seen(fuse_(model, dry_run=True))
    entries = [Skipped(name, "a reason", "its class") for name in "01"]
    twins.check_seen(FusionReport(model, skipped=entries))
    for name, entry in zip("10", entries, strict=True):
        with pytest.raises(AssertionError, match=f"nothing is said about {name}"):
            twins.check_seen(FusionReport(model, skipped=[entry]))


def test_a_failure_shows_the_source_and_the_change(monkeypatch):
    """Broken on purpose: each fused operation is one part in a hundred too large."""
    right = aten.after_norm
    monkeypatch.setattr(aten, "after_norm", lambda *args: right(*args) * 1.01)

    @settings(max_examples=20, phases=[Phase.generate], **SETTINGS)
    @given(forwards())
    def run(text):
        twins.check_forward(text)

    with pytest.raises(AssertionError, match=r"call \d, output 0") as failure:
        run()
    text = str(failure.value)[str(failure.value).index("import copy") :]
    assert "class Net(nn.Module):" in text and "def change_0(model):" in text
    with pytest.raises(AssertionError, match=r"call \d, output 0"):
        twins.check_forward(text)
    monkeypatch.undo()
    twins.check_forward(text)
