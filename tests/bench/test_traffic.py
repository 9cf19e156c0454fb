"""Passes over memory, counted by hand and by the recorder, and the README's block of them."""

from pathlib import Path

import pytest

from bench.report import traffic

ROOT = Path(__file__).resolve().parents[2]
BY_HAND = {
    # conv 2, norm 3 (its input twice), ReLU in place 2 | ReLU's gradient 3, the norm's 5, the convolution's 2 + 2
    "conv, BN, ReLU": ((7, 12), (4, 9)),
    # the sum in place 3 | both gradients of x added 3; fused: x once more | its gradient written, and added
    "conv, BN, + x, ReLU": ((10, 15), (5, 11)),
    # four convolutions of halves 4, two sums 3, the identity 1.5, norms 3, ReLUs 2 | ReLUs 3, norms 5, convolutions 8,
    # gradients of r from three places and of t from two 4.5
    "RiR, two streams": ((13.5, 20.5), (4, 9)),
}


def test_every_layer_is_counted_by_hand():
    assert [layer.name for layer in traffic.LAYERS] == [*BY_HAND]


@pytest.mark.parametrize("layer", traffic.LAYERS, ids=lambda layer: layer.name)
def test_passes(layer):
    assert (traffic.eager(layer), traffic.ours(layer)) == BY_HAND[layer.name]


def test_the_readme_has_what_is_counted():
    begin, end = traffic.MARKERS
    assert f"{begin}\n{traffic.block()}\n{end}" in (ROOT / "README.md").read_text()
    assert traffic.bars()[:8] == (ROOT / traffic.PICTURE).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_another_block_is_replaced(tmp_path):
    (tmp_path / "docs").mkdir()
    begin, end = traffic.MARKERS
    (tmp_path / "README.md").write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert traffic.update(tmp_path) == [traffic.README, traffic.PICTURE]
    assert (tmp_path / "README.md").read_text() == f"before\n{begin}\n{traffic.block()}\n{end}\nafter\n"
    assert traffic.update(tmp_path) == []
