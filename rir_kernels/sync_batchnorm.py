"""Batch norm with statistics over the batch on all ranks: the module, and the conversion of a model."""

import copy
import warnings

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .common.spec import kept_spec
from .dispatch import bn_state


class SyncBatchNorm2d(nn.BatchNorm2d):
    """An nn.BatchNorm2d that in training normalizes with the mean and variance over all ranks of `process_group`.

    `convert_sync_batchnorm` makes it. Statistics cover the whole batch however it is split over the ranks, empty parts
    included, on any device that the group's backend supports. Every rank has to make the call, and its backward. In
    evaluation, in a group of one, and if torch.distributed is not initialized, it behaves as nn.BatchNorm2d.

    process_group: None is the whole world. Copies of the module share it; torch refuses to pickle it.

    Raises, before any exchange, TypeError for dtypes, ValueError for shapes and values, RuntimeError for devices. As
    with torch's SyncBatchNorm one value per channel on a rank is no error, since others may have more.
    """

    process_group = None

    def active_group(self):
        """The group that shares this call's statistics, None if they are local."""
        distributed = torch.distributed
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return None
        group = distributed.group.WORLD if self.process_group is None else self.process_group
        return group if distributed.get_world_size(group) > 1 else None  # -1 on a rank outside it

    def forward(self, input):
        if self.active_group() is None:
            return super().forward(input)
        return bn_state.norm_act(self, input, spec=kept_spec(eps=self.eps, activation=None))

    def __deepcopy__(self, memo):
        memo[id(self.process_group)] = self.process_group  # a communicator: shared, never copied
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin


def convert_sync_batchnorm(module: nn.Module, process_group=None) -> nn.Module:
    """Makes every BatchNorm2d in `module` compute its statistics over the batch on all ranks, in place.

    This covers this library's layers, what `fuse_` has fused, and any other BatchNorm2d, on CPU and GPU; layers stay
    fused, and `fuse_` may also follow. Only the class of a norm changes, to SyncBatchNorm2d: parameter and buffer
    objects, state_dict keys, hooks, mode and device stay, and an existing optimizer keeps working. Call it on every
    rank, before DistributedDataParallel or fully_shard. A second call sets another group.

    Args:
        process_group: its ranks share statistics (torch.distributed.new_group); None is the whole world.

    Returns: `module`.

    It does not convert torch's own SyncBatchNorm nor, with one warning that names them, norms that are not exactly an
    nn.BatchNorm2d: a subclass's additional behaviour would be lost.

    Raises TypeError for a module that is no nn.Module and for a process_group that is no process group.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    _check_group(process_group)
    left = []
    for name, norm in module.named_modules():
        if type(norm) in (nn.BatchNorm2d, SyncBatchNorm2d) and "forward" not in norm.__dict__:
            norm.__class__ = SyncBatchNorm2d
            norm.process_group = process_group
        elif isinstance(norm, _BatchNorm) and not isinstance(norm, nn.SyncBatchNorm):
            left.append(f"{name or 'the module'} ({type(norm).__name__})")
    if left:
        warnings.warn(
            f"left unsynchronized, since only an untouched nn.BatchNorm2d can be converted: {', '.join(left)}",
            stacklevel=2,
        )
    return module


def _check_group(group):
    if group is None:
        return
    distributed = torch.distributed
    if not distributed.is_available():
        raise TypeError("process_group must be None: this build of torch has no torch.distributed")
    if group != distributed.GroupMember.NON_GROUP_MEMBER and not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}: "
            "torch.distributed.new_group makes one, and a DeviceMesh has get_group()"
        )
