"""A run on a GPU: graphs, bf16, and continuing."""

import pytest
import torch

from models.training import build, run
from tests.models.training.small import assert_same_bits, images, start, weights

pytestmark = [pytest.mark.gpu, pytest.mark.real_gpu("training in torch's own operators, and CUDA graphs")]


def trained(out, **changes):
    found = start(out, device="cuda", **changes)
    assert found.train()
    return found


def test_graphs_compute_what_eager_calls_do(tmp_path):
    """The graph's warm-up is not a batch, and every replay updates running statistics."""
    changes = {"precision": "fp32", "learning_rate": 1e-3, "epochs": 2}
    eager, graphed = (trained(tmp_path / str(graphs), graphs=graphs, **changes) for graphs in (False, True))
    for name, tensor in weights(eager).items():
        if name.startswith("model."):
            # TF32 products may be summed in another order by another algorithm; six small steps
            torch.testing.assert_close(
                weights(graphed)[name], tensor, rtol=2e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
    counters = [t for n, t in graphed.model.state_dict().items() if n.endswith("num_batches_tracked")]
    assert all(counter == 6 for counter in counters)


@pytest.mark.parametrize("graphs", [False, True])
def test_continued_with_the_same_bits(graphs, tmp_path):
    changes = {"precision": "bf16", "graphs": graphs, "impl": "triton"}
    whole = trained(tmp_path / "whole", **changes)
    first = start(tmp_path / "parts", device="cuda", **changes)
    steps = iter([False] * 3 + [True])
    assert not first.train(stop=lambda: next(steps))
    second = start(tmp_path / "parts", device="cuda", **changes)
    assert second.resume()
    assert second.train()
    assert_same_bits(weights(second), weights(whole))


def test_bf16_learns(tmp_path):
    found = trained(tmp_path, precision="bf16", epochs=30, augment=False)
    assert found.records[-1]["train_accuracy"] > 90
    model, facts = build.load(tmp_path / run.WEIGHTS, device="cuda")
    assert next(model.parameters()).is_cuda
    assert facts["data"]["train"] == len(images().train_y)


def test_nothing_in_a_step_waits_for_the_device(tmp_path):
    found = start(tmp_path, device="cuda", precision="bf16")
    found.prepare()
    moved = {"padding": found.padding, "flip": found.flip, "jitter": found.jitter}
    plan = run.augment.plan_epoch(100, seed=0, epoch=0, **moved).to("cuda")
    found._update(plan)  # compiles, allocates
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found._update(plan)
    finally:
        torch.cuda.set_sync_debug_mode(before)
