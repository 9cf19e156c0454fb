"""What "auto" takes: as measured where it was, by rule elsewhere, and never from a file that is not one."""

import json

import pytest
import torch

from bench.measure.choose import choose as choose_by
from rir_kernels.common import devices
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.dispatch import choices, choose, preference
from tests.bench.helpers import results, row

NAME = "Made-up GPU"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "FOLDER", tmp_path)
    yield tmp_path
    choices._load.cache_clear()


def pair(triton, hybrid, **same):
    return [row(impl="triton", ms_median=triton, **same), row(impl="hybrid", ms_median=hybrid, **same)]


def taken(c_in, c_out=None, rows=32, dtype="torch.bfloat16", training=True, kernel=3, stride=1):
    return choices.measured_choice(NAME, (c_in, c_out or c_in, kernel, stride, rows, dtype, training))


def test_the_faster_one_is_taken(folder):
    path = choose_by(
        [
            results(
                [
                    *pair(0.3, 0.2),
                    *pair(0.2, 0.3, mode="eval"),
                    *pair(0.100, 0.099, shape="64@8"),
                    *pair(0.3, 0.2, shape="64@56"),
                    *pair(0.1, 0.5, shape="96-192@32 /2"),
                    *pair(0.1, 0.5, mode="bwd", dtype="fp16"),
                ]
            )
        ],
        folder,
    )
    assert path.name == "made-up-gpu.json"
    assert taken(96) == "hybrid" and taken(96, training=False) == "triton"
    assert taken(64, rows=8) == "triton"  # within the noise
    assert taken(64, rows=56) == "hybrid"
    assert taken(96, 192, stride=2) == "triton"
    assert taken(96, dtype="torch.float16") is None and taken(96, rows=16) is None


def test_the_largest_batch_decides_and_graphs_alone(folder):
    choose_by([results([*pair(0.1, 0.2, batch=1), *pair(0.2, 0.1, batch=512), *pair(0.1, 0.2, batch=32)])], folder)
    assert taken(96) == "hybrid"
    with pytest.raises(ValueError, match="no RiR layer has graph times of both hybrid and triton"):
        choose_by([results(pair(0.1, 0.2, graph=False))], folder)
    with pytest.raises(ValueError, match="no RiR layer"):
        choose_by([results([*pair(0.1, 0.2, passed=False)])], folder)


def test_auto_takes_it(folder, monkeypatch):
    choose_by([results(pair(0.3, 0.2))], folder)
    monkeypatch.setattr(choose, "_missing_on", lambda index: "")
    monkeypatch.setattr(devices, "_name_at", lambda index: NAME)

    class OnGPU:
        """As much of a tensor on a GPU as the choice looks at."""

        device, dtype = torch.device("cuda", 0), torch.bfloat16
        shape = (256, 96, 32, 32)

    weight, spec = torch.empty(96, 96, 3, 3), ConvBNActSpec()
    assert choose.resolve("auto", OnGPU, weight, spec, training=True) == "hybrid"
    assert choose.resolve("auto", OnGPU, weight, spec, training=False) == "triton"
    assert choose.resolve("auto", OnGPU, torch.empty(64, 96, 3, 3), spec, training=True) == "triton"
    with preference.use_impl("torch"):
        assert choose.resolve("auto", OnGPU, weight, spec, training=True) == "torch"


GOOD = {
    "c_in": 96, "c_out": 96, "kernel": 3, "stride": 1, "rows": 32, "dtype": "torch.bfloat16", "training": True,
    "impl": "hybrid",
}  # fmt: skip


def test_a_good_file_is_read(folder):
    (folder / "made-up-gpu.json").write_text(json.dumps({"schema": 1, "choices": [GOOD]}))
    assert taken(96) == "hybrid"


@pytest.mark.parametrize(
    "change", [{"impl": "os.system"}, {"c_in": -1}, {"c_in": "96"}, {"rows": 0}, {"training": 1}, {"more": 1}], ids=str
)
def test_a_bad_entry_is_refused(folder, change):
    (folder / "made-up-gpu.json").write_text(json.dumps({"schema": 1, "choices": [GOOD | change]}))
    with pytest.warns(UserWarning, match='made-up-gpu.json is ignored, "auto" goes by its rule'):
        assert taken(96) is None


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 9}', '{"schema": 1}'])
def test_a_bad_file_is_refused(folder, text):
    (folder / "made-up-gpu.json").write_text(text)
    with pytest.warns(UserWarning, match="is ignored"):
        assert taken(96) is None


def test_shipped_files_are_valid():
    for path in choices.FOLDER.glob("*.json"):
        assert len(choices._load(path)) == len(json.loads(path.read_text())["choices"])
