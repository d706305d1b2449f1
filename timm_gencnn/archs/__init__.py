"""The paper's networks, which timm lacks, as plain timm models: lenet, alexnet, zfnet."""

from .lenet import LeNet as LeNet
