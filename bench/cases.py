"""The layer table. It lives in the package (``fused_resnet/cases.py``), so that an installed ``fused-resnet bench`` has it
too; this is a short way to it for what is in this folder."""

from fused_resnet.cases import AWKWARD, BLOCKS, CONVS, NETWORKS, BlockCase, ConvCase

__all__ = ["AWKWARD", "BLOCKS", "CONVS", "NETWORKS", "BlockCase", "ConvCase"]
