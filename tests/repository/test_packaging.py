"""What is shipped: the files of the wheel and of the source distribution, one version, public names."""

import re
from pathlib import Path

from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import rir_kernels as rir

ROOT = Path(__file__).parents[2]


def files_of(builder):
    """{path in the distribution} of what would go into it."""
    return {Path(file.distribution_path).as_posix() for file in builder(str(ROOT)).recurse_included_files()}


def sources(*folders):
    """Files, but for caches and what an editor leaves."""
    paths = (path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if not any(part.startswith((".", "__pycache__")) for part in path.parts)}


def test_the_wheel_holds_the_package_and_nothing_else():
    """Its data too: tiles and choices that were measured are JSON files in it."""
    assert files_of(WheelBuilder) == sources("rir_kernels")
    assert "rir_kernels/py.typed" in files_of(WheelBuilder)


def test_data_of_the_package_are_shipped(tmp_path):
    """As `python -m bench tune` and `bench choose` leave them, in folders that may not exist yet."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    data = {"rir_kernels/triton/tiling/tiles/nvidia-h200.json", "rir_kernels/dispatch/choices/nvidia-h200.json"}
    for path in map(tmp_path.joinpath, data):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    found = WheelBuilder(str(tmp_path)).recurse_included_files()
    assert {Path(file.distribution_path).as_posix() for file in found} == data


def test_the_source_distribution_can_be_tested():
    """The builder adds pyproject.toml, README.md and LICENSE by itself."""
    found = files_of(SdistBuilder)
    assert sources("rir_kernels", "tests", "docs", "emulator") | {"Makefile", "CHANGELOG.md"} <= found
    assert {"bench/__main__.py", "models/train.py", "demo/__main__.py", "scripts/setup-venv.sh"} <= found


def test_one_version():
    assert WheelBuilder(str(ROOT)).metadata.version == rir.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert rir.__version__.partition(".dev")[0] == newest


def test_completion_offers_public_names():
    """Submodules among them; the others can be imported by name."""
    offered = [name for name in dir(rir) if not name.startswith("_")]
    assert offered == sorted(rir.__all__)
    assert {"functional", "reference", "surgery"} <= set(offered)
    assert {"__version__", "__doc__", "__file__"} <= set(dir(rir))
    assert all(hasattr(rir, name) for name in dir(rir))
