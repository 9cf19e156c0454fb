"""The networks, and what of each must be found."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bench.cases import libraries


@dataclass(frozen=True)
class Architecture:
    """`name` of `library`, built by `make`, None where the library does not import.

    size: of the square images; small, but large enough that no norm sees a single value. needs: patterns without which
    the fusion has missed what the network is made of. untouched: there is nothing to fuse. idle: operations whose
    module is always called in another way than it was traced (an optional argument is given), and so never run.
    """

    library: str
    name: str
    make: Callable[[], nn.Module | None]
    size: int
    needs: tuple[str, ...] = ()
    untouched: bool = False
    idle: int = 0

    @property
    def id(self) -> str:
        return f"{self.library}/{self.name}"


def _torchvision(name, *needs, size=64, untouched=False, **options):
    def make():
        library = libraries.torchvision()
        return library and library.models.get_model(name, weights=None, **options)

    return Architecture("torchvision", name, make, size, needs, untouched)


def _timm(name, *needs, size=64, untouched=False, idle=0, **options):
    def make():
        library = libraries.timm()
        return library and library.create_model(name, **options)

    shown = f"{name}({', '.join(f'{option}={value}' for option, value in options.items())})" if options else name
    return Architecture("timm", shown, make, size, needs, untouched, idle)


def _pytorchcv(name, models, *needs, size=32, untouched=False, **options):
    def make():
        library = libraries.pytorchcv(models)
        return library and getattr(library, name)(**options)

    return Architecture("pytorchcv", name, make, size, needs, untouched)


ZOO = (
    _torchvision("resnet18", "P1", "P2", "P3"),
    _torchvision("resnet50", "P1", "P2", "P3"),
    _torchvision("wide_resnet50_2", "P1", "P2", "P3"),
    _torchvision("resnext50_32x4d", "P1", "P2", "P3"),
    _torchvision("vgg11_bn", "P1"),
    _torchvision("densenet121", "P5"),
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("googlenet", "P1", init_weights=False),
    _torchvision("inception_v3", "P1", size=299, init_weights=False),
    _torchvision("regnet_y_400mf", "P1"),
    _torchvision("shufflenet_v2_x1_0", "P1"),
    _torchvision("efficientnet_b0"),
    _torchvision("mnasnet1_0", "P1"),
    _torchvision("fcn_resnet50", "P1", "P2", "P3", weights_backbone=None, aux_loss=True),
    _torchvision("deeplabv3_resnet50", "P1", "P2", "P3", weights_backbone=None),
    _torchvision("resnet34", "P1", "P2", "P3"),
    _torchvision("squeezenet1_1", untouched=True),
    _torchvision("regnet_x_400mf", "P1", "P2", "P3"),
    _torchvision("shufflenet_v2_x0_5", "P1"),
    _torchvision("mnasnet0_5", "P1", "P2", "P3"),
    _torchvision("efficientnet_v2_s", "P2"),
    _torchvision("swin_t", untouched=True),
    _timm("resnet18", "P1", "P2", "P3"),
    _timm("resnet50", "P1", "P2", "P3"),
    _timm("resnet50", "P1", "P2", drop_path_rate=0.2, drop_rate=0.1),
    _timm("resnet50d", "P1", "P2", "P3"),
    _timm("resnetv2_50", "P1", "P5"),
    _timm("resnetv2_50x1_bit", untouched=True),
    _timm("seresnet50", "P1", "P2"),
    _timm("resnext50_32x4d", "P1", "P2", "P3"),
    _timm("wide_resnet50_2", "P1", "P2", "P3"),
    _timm("resnetblur50", "P1", "P2", "P3"),
    _timm("densenet121", "P5"),
    _timm("regnety_004", "P1"),
    _timm("efficientnet_b0"),
    _timm("dla34", "P1", "P3", idle=12),
    _timm("hrnet_w18_small", "P1", "P3"),
    _timm("convnext_atto", untouched=True),
    _timm("vit_tiny_patch16_224", size=224, untouched=True),
    _timm("resnet10t", "P1", "P2", "P3"),
    _timm("resnet14t", "P1", "P2", "P3"),
    _timm("resnet26", "P1", "P2", "P3"),
    _timm("resnet34d", "P1", "P2", "P3"),
    _timm("resnetrs50", "P1", "P2"),
    _timm("seresnet18", "P1", "P2"),
    _timm("seresnext26t_32x4d", "P1", "P2"),
    _timm("legacy_seresnet18", "P1", "P3"),
    _timm("ecaresnet26t", "P1", "P2"),
    _timm("skresnet18", "P1", "P2"),
    _timm("res2net50_26w_4s", "P1", "P2", "P3"),
    _timm("resnest14d", "P1", "P2", "P3"),
    _timm("cspresnet50", "P2"),
    _timm("cspdarknet53"),
    _timm("darknet53"),
    _timm("ese_vovnet19b_dw", "P1"),
    _timm("dpn48b", "P5"),
    _timm("gernet_s", "P1", "P2"),
    _timm("repvgg_a0", "P2"),
    _timm("regnetx_002", "P1", "P2"),
    _timm("regnetz_005", "P2"),
    _timm("selecsls42b", "P1"),
    _timm("dla46_c", "P1", "P2", "P3", idle=18),
    _timm("xception41", "P1", "P2"),
    _timm("mobilenetv2_035", "P2", "P3"),
    _timm("mobilenetv3_small_050", "P1", "P2", "P3"),
    _timm("mobilenetv4_conv_small", "P1", "P2"),
    _timm("mobileone_s0", "P2"),
    _timm("mnasnet_small", "P1", "P2", "P3"),
    _timm("ghostnet_050", "P1", "P2"),
    _timm("repghostnet_050", "P1", "P2"),
    _timm("hardcorenas_a", "P1", "P2", "P3"),
    _timm("tinynet_e", "P2", "P3"),
    _timm("rexnet_100", "P1", "P2"),
    _timm("mixnet_s", "P1", "P3"),
    _timm("efficientnet_lite0", "P2", "P3"),
    _timm("fbnetc_100", "P1", "P2", "P3"),
    _timm("lcnet_035"),
    _timm("levit_128s", "P2", size=224),
    _timm("visformer_tiny", "P1", "P2", size=224),
    _timm("efficientformer_l1", "P1", "P2", size=224),
    _timm("fastvit_t8", "P2"),
    _timm("edgenext_xx_small", untouched=True),
    _timm("crossvit_tiny_240", size=240, untouched=True),
    _pytorchcv("resnet20_cifar10", "resnet_cifar", "P1", "P2", "P3"),
    _pytorchcv("resnet56_cifar10", "resnet_cifar", "P1", "P2", "P3"),
    _pytorchcv("preresnet20_cifar10", "preresnet_cifar", "P5"),
    _pytorchcv("wrn16_10_cifar10", "wrn_cifar", "P5"),
    _pytorchcv("resnext20_16x4d_cifar10", "resnext_cifar", "P1", "P2", "P3"),
    _pytorchcv("seresnet20_cifar10", "seresnet_cifar", "P1", "P2"),
    _pytorchcv("sepreresnet20_cifar10", "sepreresnet_cifar", "P5"),
    _pytorchcv("densenet40_k12_cifar10", "densenet_cifar", "P5"),
    _pytorchcv("pyramidnet110_a48_cifar10", "pyramidnet_cifar", "P1", "P3"),
    _pytorchcv("ror3_56_cifar10", "ror_cifar", "P1", "P3"),
    _pytorchcv("resdropresnet20_cifar10", "resdropresnet_cifar", "P1"),
    _pytorchcv("shakedropresnet20_cifar10", "shakedropresnet_cifar", "P1"),
    _pytorchcv("shakeshakeresnet20_2x16d_cifar10", "shakeshakeresnet_cifar", "P1"),
    _pytorchcv("diaresnet20_cifar10", "diaresnet_cifar", "P1"),
    _pytorchcv("rir_cifar10", "rir_cifar", "P4"),
    _pytorchcv("nin_cifar10", "nin_cifar"),
    _pytorchcv("diracnet18v2", "diracnetv2", size=224),
    _pytorchcv("mobilenet_w1", "mobilenet", "P1", size=224),
    _pytorchcv("resnetd50b", "resnetd", "P1", "P2", "P3", size=64),
    _pytorchcv("preresnet18", "preresnet", "P5", size=224),
)
