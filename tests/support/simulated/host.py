"""Host time of a layer's call, in microseconds of CPU time, as JSON: eager, under the registered op, synchronized.

    python tests/support/simulated/host.py

The simulated driver launches nothing, memory is taken to lie where it lay before, as a GPU's allocator has it, and the
process group is torch's "fake" one of two ranks, which exchanges nothing. Only ratios of one run count.
"""

import gc
import json
import sys
import time

import stand_in
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import rir_kernels as rir
from rir_kernels.autograd import registered_op
from rir_kernels.common.spec import ConvBNActSpec
from rir_kernels.triton.plan import plan

CHANNELS, CALLS, ROUNDS = 16, 60, 7


def microseconds(call):
    """The shortest of some rounds."""
    for _ in range(20):
        call()
    rounds = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(CALLS):
            call()
        rounds.append((time.process_time() - began) / CALLS)
    return round(min(rounds) * 1e6, 1)


def steady(bind):
    """`Plan._at` where addresses come again: it binds launches to the first ones it sees."""

    def at(self, buffers, scalars):
        [t.data_ptr() for t in buffers if t is not None]  # which it would look up
        return next(iter(self._ready.values()), None) or bind(self, buffers, scalars)

    return at


def layer():
    made = rir.RiRLayer(CHANNELS, CHANNELS, impl="triton", dtype=torch.bfloat16)
    made.bn.float()
    return made.to(memory_format=torch.channels_last)


def main():
    stand_in.activate()
    plan.Plan._at = steady(plan.Plan._at)
    torch.set_num_threads(1)
    gc.disable()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)

    plain, synchronized = layer(), rir.convert_sync_batchnorm(layer())
    images = torch.zeros(2, CHANNELS, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    trained, dy = images.clone().requires_grad_(), torch.ones_like(images)
    row = torch.zeros(2 * CHANNELS + 4)
    json.dump(
        {
            "eager, evaluation": microseconds(torch.no_grad()(lambda: plain.eval()(images))),
            "op, evaluation": microseconds(_op(plain, images, training=False)),
            "eager, forward": microseconds(lambda: plain.train()(trained)),
            "op, forward": microseconds(_op(plain, images, training=True)),
            "synchronized, forward": microseconds(lambda: synchronized(trained)),
            "eager, step": microseconds(lambda: plain(trained).backward(dy)),
            "op, backward": microseconds(_backward(plain, images, dy)),
            "synchronized, step": microseconds(lambda: synchronized(trained).backward(dy)),
            "an exchange": microseconds(lambda: _exchange(row)),
        },
        sys.stdout,
        indent=1,
    )


def _exchange(row):
    from rir_kernels.distributed.ranks import Ranks

    return Ranks(dist.group.WORLD).gather(row)


def _tensors(module, images):
    bn = module.bn
    return images, module.weight.detach(), None, bn.weight.detach(), bn.bias.detach()


def _options(training):
    spec = ConvBNActSpec(padding=(1, 1), shortcut_channels=CHANNELS // 2)
    return (*registered_op.flat(spec), training)


def _op(module, images, *, training):
    tensors, options = _tensors(module, images), _options(training)
    running = (None, None) if training else (module.bn.running_mean, module.bn.running_var)
    op = torch.ops.rir_kernels.conv_bn_act.default
    return lambda: op(*tensors, *running, [], *options, training, "triton")


def _backward(module, images, dy):
    x, weight, _, gamma, beta = _tensors(module, images)
    _, z, mean, _, invstd = _op(module, images, training=True)()
    op, options = torch.ops.rir_kernels.conv_bn_act_backward.default, _options(True)
    needs = [True, True, False, True, True, False]
    return lambda: op(dy, x, weight, z, None, mean, invstd, gamma, beta, *options, needs, "triton")


if __name__ == "__main__":
    main()
