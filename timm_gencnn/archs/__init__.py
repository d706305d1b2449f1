"""Plain timm models that timm lacks: the paper's lenet, alexnet and zfnet, and networks for small images."""

from .alexnet import AlexNet as AlexNet
from .alexnet_small import AlexNetSmall as AlexNetSmall
from .lenet import LeNet as LeNet
from .resnet_small import SmallImageResNet as SmallImageResNet
from .zfnet import ZFNet as ZFNet
