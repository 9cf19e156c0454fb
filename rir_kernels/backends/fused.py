"""The fused layer as a sequence of kernels, forward and backward, split at the batch norm's reduction.

"triton" and "hybrid" differ only in the convolution. Tensors are channels_last and validated. Without a weight there is
no convolution and z is x, which is then dense.
"""

import importlib

import torch

from rir_kernels.common.spec import ConvBNActSpec


def kernels(impl: str, weight):
    """Returns (convolution, weight gradient, norm) launchers, imported late: triton is optional and slow to import."""
    norm = importlib.import_module("rir_kernels.triton.launch.batchnorm")
    if weight is None:
        return importlib.import_module("rir_kernels.backends.no_conv"), None, norm
    if impl == "hybrid":
        vendor = importlib.import_module("rir_kernels.backends.cudnn")
        return vendor, vendor, norm
    conv = importlib.import_module("rir_kernels.triton.launch.conv")
    return conv, importlib.import_module("rir_kernels.triton.launch.wgrad"), norm


def forward(
    x, weight, bias, gamma, beta, running_mean, running_var, residuals, spec,
    *, training, save, impl, momentum=0.0, batches=None,
):  # fmt: skip
    """Returns (y, z, mean, var, invstd); None for what is not computed, and for z if it is x.

    training: uses batch statistics and always returns z, mean, biased var and invstd; updates the running statistics
    and their counter `batches` if given. Otherwise uses the running statistics, and returns z, mean and invstd only if
    `save`.
    """
    conv, _, norm = kernels(impl, weight)
    if training:
        z, moments = conv.conv_train(x, weight, bias=bias, residuals=residuals, spec=spec)
        statistics = norm.bn_finalize(
            moments, spec.eps, running_mean=running_mean, running_var=running_var, batches=batches, momentum=momentum
        )
        after = residuals if spec.post_norm else ()
        y = norm.bn_apply(z, statistics, gamma=gamma, beta=beta, residuals=after, spec=spec)
        return y, None if weight is None else z, statistics.mean, statistics.var, statistics.invstd
    y, z = conv.conv_infer(
        x, weight, bias=bias, residuals=residuals, spec=spec,
        mean=running_mean, var=running_var, gamma=gamma, beta=beta, save_z=save,
    )  # fmt: skip
    if not save:
        return y, None, None, None, None
    statistics = norm.bn_running(running_mean, running_var, spec.eps)
    return y, None if weight is None else z, statistics.mean, None, statistics.invstd


def backward(
    dy, x, weight, z, y, mean, invstd, gamma, beta, spec: ConvBNActSpec,
    *, training, needs, impl, upstream=None, sums=None, means=None,
):  # fmt: skip
    """Returns (dx, dweight, dbias, dgamma, dbeta, dresidual), None for those that `needs`, in that order, excludes.

    y is given if its sign gives the activation's derivative. dresidual has all C_out channels. The gradients of
    the per-channel parameters are fp32.

    upstream (`launch.batchnorm.Upstream`): the layer whose dy is this dx. It adds a seventh result: sum dy' and
    sum dy' * xhat of that layer if they were computed with dx, else None. Multiplied by its `norm_scale` they are its
    `sums`, which save it the reduction.

    means: of dy' and dy' * xhat over all pixels that the statistics cover, if those are not only the local ones.
    """
    conv, wgrad, norm = kernels(impl, weight)
    need_x, need_weight, need_bias, need_gamma, need_beta, need_residual = needs
    per_channel = {"mean": mean, "invstd": invstd, "gamma": gamma, "beta": beta, "spec": spec}
    residual_is_dz = need_residual and not spec.post_norm
    need_dz = need_x or need_weight or residual_is_dz

    dy = norm.evenly_spaced(dy)
    dx = dweight = dbias = dz = dresidual = upstream_sums = None
    if sums is None and (need_gamma or need_beta or need_bias or (training and need_dz)):
        sums = norm.bn_reduce(dy, z, y, **per_channel)
    if need_dz or need_residual:
        count = (1 if means else z.numel() // z.shape[1]) if training else None
        dz, dresidual = norm.bn_apply_grad(
            dy, z, y, means or sums, count=count, **per_channel,
            need_dz=need_dz, need_dres=need_residual and spec.post_norm,
        )  # fmt: skip
    if need_x:
        dx, partial = conv.conv_data_grad(dz, weight, shape=tuple(x.shape), spec=spec, upstream=upstream)
        upstream_sums = None if partial is None else norm.bn_sum(partial, 1.0)
    if need_weight:
        dweight = wgrad.conv_weight_grad(dz, x, kernel=tuple(weight.shape[2:]), spec=spec)
    if need_bias:
        # the sum of dz over the pixels: batch statistics cancel any constant, so in training it is exactly zero
        if training:
            dbias = torch.empty_like(mean).zero_()
        else:
            dbias = (invstd if gamma is None else invstd * gamma.float()) * sums[0] * spec.conv_scale
    dbeta, dgamma = sums or (None, None)
    gradients = (
        dx,
        dweight,
        dbias,
        dgamma if need_gamma else None,
        dbeta if need_beta else None,
        dz if residual_is_dz else dresidual,
    )
    return gradients if upstream is None else (*gradients, upstream_sums)
