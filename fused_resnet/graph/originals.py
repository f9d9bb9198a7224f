"""What torch's layers are when this package is imported: a class that is patched later, or a subclass, may compute something else."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from .facts import Facts, lookup

# Attributes that a class may hide, behind a property for instance.
_CONV = ("weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode")
_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
_NORM = ("weight", "bias", "running_mean", "running_var", "eps", "training")
ORIGINAL: dict[type, dict[str, Any]] = {
    cls: {name: lookup(cls, name) for name in names}
    for cls, names in {
        nn.Module: ("__call__", "_wrapped_call_impl", "_call_impl"),
        nn.Sequential: ("forward", "__iter__", "__len__", "__getitem__"),
        nn.ModuleList: ("__iter__", "__len__", "__getitem__"),
        nn.ModuleDict: ("__iter__", "__len__", "__getitem__"),
        nn.Conv2d: ("forward", "_conv_forward", *_CONV),
        nn.BatchNorm2d: ("forward", "_check_input_dim", *_NORM),
        nn.SyncBatchNorm: ("forward", "_check_input_dim", *_NORM),
        nn.ReLU: ("forward",),
        nn.Identity: ("forward",),
        nn.AvgPool2d: ("forward",),
        nn.MaxPool2d: ("forward", *_POOL),
        nn.AdaptiveAvgPool2d: ("forward", "output_size"),
        nn.Flatten: ("forward", "start_dim", "end_dim"),
        nn.Linear: ("forward", "weight", "bias"),
        nn.AdaptiveMaxPool2d: ("forward",),
        nn.ZeroPad2d: ("forward",),
        nn.ConstantPad2d: ("forward",),
        nn.Dropout: ("forward",),
        nn.Dropout1d: ("forward",),
        nn.Dropout2d: ("forward",),
        nn.Dropout3d: ("forward",),
        nn.AlphaDropout: ("forward",),
        nn.FeatureAlphaDropout: ("forward",),
    }.items()
}


# The functions through which their forwards compute, as they are in torch.nn.functional when this package is imported.
COMPUTES: dict[type, tuple[str, Any]] = {
    nn.Conv2d: ("conv2d", F.conv2d),
    nn.BatchNorm2d: ("batch_norm", F.batch_norm),
    nn.SyncBatchNorm: ("batch_norm", F.batch_norm),
    nn.ReLU: ("relu", F.relu),
    nn.MaxPool2d: ("max_pool2d", F.max_pool2d),
    nn.AdaptiveAvgPool2d: ("adaptive_avg_pool2d", F.adaptive_avg_pool2d),
    nn.Linear: ("linear", F.linear),
    nn.Dropout: ("dropout", F.dropout),
    nn.Dropout1d: ("dropout1d", F.dropout1d),
    nn.Dropout2d: ("dropout2d", F.dropout2d),
    nn.Dropout3d: ("dropout3d", F.dropout3d),
    nn.AlphaDropout: ("alpha_dropout", F.alpha_dropout),
    nn.FeatureAlphaDropout: ("feature_alpha_dropout", F.feature_alpha_dropout),
}


def computes_as_ever(facts: Facts, cls: type, base: type) -> bool:
    """Whether a subclass of torch's class computes what that did when this package was imported."""
    name, function = COMPUTES.get(base, ("", None))
    as_ever = [facts.lookup(cls, n) is value for n, value in ORIGINAL[base].items()]
    return all(as_ever) and (not name or facts.item(F.__dict__, name) is function)
