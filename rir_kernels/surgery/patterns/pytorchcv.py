"""pytorchcv (as of 0.0.74): its blocks wrap conv, norm and activation in separate modules, and chains cross these.

Post-activation units add the identity after their body's last ConvBlock; pre-activation bodies have the next block's
norm after a block's convolution.
"""

from ..registry import inline

inline(
    "pytorchcv.models.common.conv.ConvBlock",
    "pytorchcv.models.common.conv.PreConvBlock",
    "pytorchcv.models.resnet.ResBlock",
    "pytorchcv.models.resnet.ResBottleneck",
    "pytorchcv.models.resnext.ResNeXtBottleneck",
    "pytorchcv.models.ror_cifar.RoRBlock",
    "pytorchcv.models.regnet.RegNetBottleneck",
    "pytorchcv.models.drn.DRNConv",
    "pytorchcv.models.drn.DRNBlock",
    "pytorchcv.models.drn.DRNBottleneck",
    "pytorchcv.models.airnet.AirBottleneck",
    "pytorchcv.models.airnext.AirNeXtBottleneck",
    "pytorchcv.models.ibnresnet.IBNResBottleneck",
    "pytorchcv.models.ibnresnext.IBNResNeXtBottleneck",
    "pytorchcv.models.scnet.ScBottleneck",
    "pytorchcv.models.preresnet.PreResBlock",
    "pytorchcv.models.preresnet.PreResBottleneck",
    "pytorchcv.models.pyramidnet.PyrBlock",
    "pytorchcv.models.pyramidnet.PyrBottleneck",
    "pytorchcv.models.wrn.WRNConv",
    "pytorchcv.models.wrn.WRNBottleneck",
)
