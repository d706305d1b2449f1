"""The paper's networks, which timm lacks, as plain timm models: lenet, alexnet, zfnet."""

from .alexnet import AlexNet as AlexNet
from .lenet import LeNet as LeNet
from .zfnet import ZFNet as ZFNet
