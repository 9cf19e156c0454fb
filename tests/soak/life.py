"""A network that is trained, evaluated, fused, unfused, copied, saved and loaded, in any order."""

import copy
import pickle

import torch
import torch.nn.functional as F
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import nn

import rir_kernels as rir
from rir_kernels.surgery import fuse_, unfuse_
from tests.pytorch.networks import BasicBlock, Bottleneck, ResNet

RATE = 0.01


class Life:
    """The network and whether it is fused. Every event checks what must hold after it."""

    def __init__(self, chance, device, impl):
        self.chance, self.device, self.impl = chance, torch.device(device), impl
        torch.manual_seed(chance.randrange(2**31))
        self.block = chance.choice((BasicBlock, Bottleneck))
        self.model = self._new()
        self.fused = False

    def _new(self):
        model = ResNet(self.block).to(self.device)
        if self.chance.random() < 0.5:
            model = model.to(memory_format=torch.channels_last)
        return model

    def _images(self):
        size = self.chance.choice((7, 8, 12))
        return torch.randn(self.chance.choice((2, 3, 8)), 3, size, size, device=self.device)

    def _scores(self, model=None, x=None):
        """In eval mode, which leaves the mode as it was."""
        model = model or self.model
        training = model.training
        with torch.no_grad():
            scores = model.eval()(x)
        model.train(training)
        return scores

    def train(self):
        """One step; the statistics have seen one batch more."""
        self.model.train()
        optimizer = torch.optim.SGD(self.model.parameters(), RATE, momentum=0.9)
        norm = next(m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d))
        seen, x = int(norm.num_batches_tracked), self._images()
        labels = torch.randint(5, (len(x),), device=self.device)
        F.cross_entropy(self.model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert int(norm.num_batches_tracked) == seen + 1
        assert all(tensor.isfinite().all() for tensor in self.model.state_dict().values())

    def evaluate(self):
        """The same bits twice, and nothing of the network changes."""
        x, before = self._images(), _bits(self.model)
        first, again = self._scores(x=x), self._scores(x=x)
        assert torch.equal(first, again) and first.isfinite().all()
        _assert_same(_bits(self.model), before)

    def fuse(self):
        if self.fused:
            return
        identities, before = _identities(self.model), _bits(self.model)
        report = fuse_(self.model, impl=self.impl)
        assert report.replaced, str(report)
        self.fused = True
        assert _identities(self.model) == identities
        _assert_same(_bits(self.model), before)

    def unfuse(self):
        """Bit for bit the network that was never fused."""
        if not self.fused:
            return
        plain, identities, x = self._plain(), _identities(self.model), self._images()
        unfuse_(self.model)
        self.fused = False
        assert _identities(self.model) == identities
        _assert_same(_bits(self.model), _bits(plain))
        assert torch.equal(self._scores(x=x), self._scores(plain, x))

    def compare(self):
        """Fused against plain modules, with all gradients and statistics, by the package's own yardstick."""
        if self.fused:
            plain = self._plain()
            for train in (False, True):
                report = rir.compare(plain, self.model, self._images(), train=train)
                assert report.passed, str(report)

    def duplicate(self):
        """A copy goes on in its place."""
        twin = copy.deepcopy(self.model) if self.chance.random() < 0.5 else pickle.loads(pickle.dumps(self.model))
        x = self._images()
        assert torch.equal(self._scores(twin, x), self._scores(x=x))
        self.model = twin

    def save_and_load(self):
        """Through a file's bytes into a new network, fused or not."""
        content = serialize({name: t.contiguous() for name, t in _bits(self.model).items()})
        before = _bits(self.model)
        self.model, self.fused = self._new(), False
        if self.chance.random() < 0.5:
            self.fuse()
        self.model.load_state_dict(deserialize(content))
        _assert_same(_bits(self.model), before)

    def refused(self):
        """A call that cannot be: it raises, and nothing has changed."""
        before = _bits(self.model)
        try:
            self.model(torch.randn(2, 4, 8, 8, device=self.device))  # one channel too many
        except (RuntimeError, ValueError):
            _assert_same(_bits(self.model), before)
        else:
            raise AssertionError("four channels were taken for three")

    def _plain(self):
        """A twin of plain modules: the same numbers, lying the same in memory, or sums would be of another order."""
        twin = ResNet(self.block)
        twin.load_state_dict(_bits(self.model), assign=True)
        return twin.train(self.model.training)


_ACTIONS = (
    Life.train, Life.train, Life.train, Life.evaluate, Life.fuse, Life.fuse, Life.unfuse, Life.compare, Life.duplicate,
    Life.save_and_load, Life.refused,
)  # fmt: skip


def live(chance, log, *, device: str, impl: str, events: int) -> None:
    """AssertionError where something does not hold."""
    lived = Life(chance, device, impl)
    for _ in range(events):
        action = chance.choice(_ACTIONS)
        log(action.__name__.replace("_", " "), fused=lived.fused, impl=impl)
        action(lived)


def _bits(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _identities(model):
    return {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), f"{name} has changed"
