"""Many steps of layers through their plans, on a driver that runs nothing: what is held before and after, as JSON.

python tests/support/simulated/leaks.py STEPS
"""

import gc
import json
import sys

import stand_in
import torch

import rir_kernels as rir
from rir_kernels.dispatch import plan_cache
from tests.soak.resources import held

WARM = 200


def main():
    stand_in.activate()
    steps, sizes = int(sys.argv[1]), (4, 6, 8)
    layers = torch.nn.Sequential(*(rir.RiRLayer(8, 8, impl="triton", dtype=torch.bfloat16) for _ in range(2)))
    for layer in layers:
        layer.bn.float()
    layers.to(memory_format=torch.channels_last)
    images = [torch.zeros(2, 8, n, n, dtype=torch.bfloat16).to(memory_format=torch.channels_last) for n in sizes]
    keep = []  # addresses that an allocator does not hand out again at once
    for step in range(WARM + steps):
        if step == WARM:
            before = _state()
        x = images[step % len(images)].clone().requires_grad_()
        keep = [*keep[-5:], x]
        layers.train(step % 5 > 0)
        layers(x).sum().backward()
        layers.zero_grad(set_to_none=True)
    json.dump({"before": before, "after": _state()}, sys.stdout)


def _state():
    gc.collect()
    objects = gc.get_objects()
    plans = [plan for plan in plan_cache._planned.values() if plan is not None]
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in objects)
    return held(torch.device("cpu")) | {"tensors": tensors, "objects": len(objects), "plans": len(plans)}


if __name__ == "__main__":
    main()
