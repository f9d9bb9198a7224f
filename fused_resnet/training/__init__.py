"""Training any network of ``fused_resnet.models`` with PyTorch's own engine: what ``fused-resnet train`` is made of.

``settings``: what a run is. ``data`` and ``folder``: images and the order in which they come. ``world``: the processes of a run.
``checkpoint``: whole or not at all. ``loop``: the steps.

Nothing random is drawn after the first weights but through a function of (seed, epoch, index of the image). So a run that was
cut off and goes on computes what it would have computed, and so do more or fewer processes with the same batches; no state of a
random number generator needs to be kept.
"""

from .errors import Failed, Wrong
from .loop import Point, Training
from .settings import Settings
from .world import World

__all__ = ["Failed", "Point", "Settings", "Training", "World", "Wrong"]
