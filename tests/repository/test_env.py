"""The environment report: complete, printable, fit for JSON, and honest about what cannot run."""

import json
import os
import subprocess
import sys

import numpy
import pytest
import torch

import rir_kernels
from rir_kernels import __main__, env
from rir_kernels.common import switches, versions
from rir_kernels.common.arguments import IMPLS
from rir_kernels.env import env_report


def test_versions_and_switches():
    report = env_report()
    assert report["rir_kernels"] == rir_kernels.__version__
    assert report["python"] == sys.version.split()[0]
    assert (report["torch"], report["numpy"]) == (torch.__version__, numpy.__version__)
    assert report["interpreter"] is switches.interpreting()
    assert report["tf32"] is (torch.backends.cudnn.conv.fp32_precision == "tf32")
    assert set(report["impls"]) == set(IMPLS) - {"auto"}
    assert report["impls"]["reference"] == report["impls"]["torch"] == "yes"


def test_a_version_outside_the_tested_ones(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "99.1.0+cpu")
    oldest, newest = versions.TESTED["torch"]
    assert env_report()["tested"].startswith(f"no: torch 99.1.0+cpu ({oldest} to {newest})")


def test_prints_as_a_table_and_goes_into_json():
    report = env_report()
    assert json.loads(json.dumps(report)) == report
    lines = str(report).splitlines()
    names = [line.split()[0] for line in lines]
    assert names[0] == "rir_kernels" and {"torch", "devices[0]", "impls.triton"} <= set(names)
    starts = {len(line) - len(line[len(name) :].lstrip()) for line, name in zip(lines, names, strict=True)}
    assert len(starts) == 1  # one column of values
    assert f"tf32{' ' * (starts.pop() - 4)}{'on' if report['tf32'] else 'off'}" in lines


def test_says_what_is_missing(monkeypatch):
    """Once, where two implementations lack the same."""
    monkeypatch.setattr(versions, "triton_missing", lambda: "triton >= 3.6, found 3.0")
    impls = env_report()["impls"]
    assert str(env_report()).count("found 3.0") == 1 and "impls.triton     no: as hybrid" in str(env_report())
    assert impls["torch"] == "yes"
    assert impls["triton"].startswith("no: ") and impls["triton"].endswith("found 3.0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
def test_without_a_gpu_the_kernels_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(versions, "triton_missing", lambda: "")
    monkeypatch.setattr(switches, "interpreting", lambda: True)
    assert env_report()["impls"]["hybrid"] == "yes"
    monkeypatch.setattr(switches, "interpreting", lambda: False)
    assert "TRITON_INTERPRET=1" in env_report()["impls"]["hybrid"]
    assert not torch.cuda.is_initialized()


@pytest.mark.gpu
@pytest.mark.real_gpu("a driver that names it")
def test_names_the_gpu():
    report = env_report()
    assert torch.cuda.get_device_name(0) in report["devices"][0]
    assert report["cudnn"] == torch.backends.cudnn.version()


def test_a_broken_install_is_told():
    assert env._version("no_such_module_here").startswith("no (ModuleNotFoundError")


@pytest.mark.parametrize("as_json", [False, True])
def test_main_prints_it(as_json, capsys):
    __main__.main(["--json"] if as_json else [])
    printed = capsys.readouterr().out
    assert (json.loads(printed) if as_json else printed.rstrip("\n")) == (
        env_report() if as_json else str(env_report())
    )


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "rir_kernels", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert json.loads(done.stdout)["rir_kernels"] == rir_kernels.__version__
