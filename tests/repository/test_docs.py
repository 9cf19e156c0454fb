"""The code of the README and of every page under docs/ runs as it stands, block after block; links lead somewhere."""

import re
from pathlib import Path

import pytest

from bench.cases.libraries import torchvision

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("bench/*.md"))]


def blocks_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.stem)
def test_code_blocks_run(page, capsys):
    if page == README and torchvision() is None:
        pytest.skip("torchvision cannot be imported here")
    namespace = {"__name__": page.stem}
    for block in blocks_of(page):
        exec(compile(block, str(page), "exec"), namespace)
    if page == README:
        printed = capsys.readouterr().out
        assert "fused 53 operations: 53 of 53 convolutions" in printed and "equivalent in train mode" in printed
        assert namespace["y"].shape == (2, 192, 16, 16)
        assert namespace["logits"].shape == (2, 10)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.stem)
def test_code_that_pip_does_not_install_is_said_to_need_a_checkout(page):
    needs = any(
        re.search(r"^(import|from) (models|bench|demo|tests)\b", block, re.MULTILINE) for block in blocks_of(page)
    )
    assert not needs or "checkout" in page.read_text()
