"""The steps of a training: forward, backward, SGD, and what is measured after each epoch.

PyTorch's own parts throughout: DataLoader, autocast, GradScaler, SGD, DistributedDataParallel.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from .data import Augmented, Batches, Data
from .errors import Failed, Wrong
from .settings import Settings, network
from .world import World

AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclasses.dataclass(frozen=True)
class Point:
    """Of the curve: the mean training loss since the point before, and the test set after ``step`` steps. A test loss that is not
    finite, as batch norm's first running statistics may make it, is None."""

    step: int
    epoch: float
    loss: float
    test_loss: float | None
    test_accuracy: float


class Training:
    """A run at some step. Every process has one, equal but for its share of each batch.

    Raises:
        Wrong: for settings that do not suit the data, the device or the number of processes.
    """

    def __init__(self, settings: Settings, data: Data, world: World, workers: int = 0) -> None:
        _check(settings, data, world)
        self.settings, self.data, self.world, self.workers = settings, data, world, workers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.network = network(settings, len(data.classes))
        if settings.sync_batch_norm:
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.memory_format = FORMATS[settings.memory_format]
        self.network.to(world.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self.parallel = DistributedDataParallel(self.network, gradient_as_bucket_view=True) if world.size > 1 else self.network
        self.images = Augmented(data.training, settings.seed) if settings.augment else data.training
        self.batches = Batches(self.images, settings.batch, settings.seed, world.rank, world.size)
        self.steps = settings.steps or (settings.epochs or 1) * self.batches.per_epoch
        self.optimizer = torch.optim.SGD(_groups(self.network, settings), settings.lr, settings.momentum)
        factor = _cosine(self.steps) if settings.schedule == "cosine" else _constant
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.amp == "fp16")
        self.step, self.seconds = 0, 0.0
        self.curve: list[Point] = []
        # The training loss since the last point: of all processes as of the last checkpoint, and of this one since then.
        self.loss, self.own_loss = 0.0, torch.zeros((), dtype=torch.float64, device=world.device)

    def state(self) -> dict[str, Any]:
        """What `restore` takes; complete, as nothing else of a run changes."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "curve": [dataclasses.asdict(point) for point in self.curve],
            "loss": self.loss,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there: mid-epoch too, with the batches that are left.

        Raises:
            Wrong: if the state is not of this network and optimizer.
        """
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            self.curve = [Point(**point) for point in state["curve"]]
            self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Wrong(f"the checkpoint does not fit the network: {str(error).splitlines()[0]}") from None

    def run(self, every: int | None, save: Callable[[], None], advance: Callable[[str], None]) -> None:
        """To the last step. ``save`` is called every so many steps (None: after each epoch) and after the last.

        Raises:
            Failed: if the loss is not finite any more; nothing is saved then.
        """
        start, before = time.perf_counter(), self.seconds
        every = every or self.batches.per_epoch
        self.parallel.train()
        note = ""
        for images, classes in self._left():
            self._train(images, classes)
            self.step += 1
            is_last = self.step == self.steps
            if is_last or self.step % self.batches.per_epoch == 0:
                self._measure()
                note = f"loss {self.curve[-1].loss:.3f}, test accuracy {self.curve[-1].test_accuracy:.1%}"
            if is_last or self.step % every == 0:
                self._collect_loss()
                self.seconds = before + time.perf_counter() - start
                save()
            advance(note)

    def _left(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from this step on: this process's share of each."""
        while self.step < self.steps:
            epoch, done = divmod(self.step, self.batches.per_epoch)
            self.batches.start(epoch, done)
            if isinstance(self.images, Augmented):
                self.images.epoch = epoch
            # Workers are started for each epoch: they hold copies of the images' epoch.
            for batch in self._loader(self.images, batch_sampler=self.batches):
                yield batch
                if self.step >= self.steps:
                    return

    def _loader(self, images: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(images, num_workers=self.workers, pin_memory=self.world.device.type == "cuda", **options)

    def _forward(self, model: nn.Module, images: Tensor) -> Tensor:
        images = images.to(self.world.device, memory_format=self.memory_format, non_blocking=True)
        amp = self.settings.amp
        with torch.autocast(self.world.device.type, AMP[amp], enabled=amp != "off"):
            outputs: Tensor = model(images)
        return outputs.float()

    def _train(self, images: Tensor, classes: Tensor) -> None:
        loss = F.cross_entropy(self._forward(self.parallel, images), classes.to(self.world.device, non_blocking=True))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.own_loss += loss.detach()

    def _collect_loss(self) -> None:
        """Each rank's loss is the mean of an equal share: their mean is that of the whole batch. The loss came before the step:
        what that made of the parameters is looked at too."""
        self.loss += self.world.sums([self.own_loss / self.world.size])[0]
        self.own_loss.zero_()
        if not math.isfinite(self.loss) or not all(p.isfinite().all() for p in self.network.parameters()):
            raise Failed(f"the loss is not finite any more at step {self.step}: a smaller --lr may help")

    def _measure(self) -> None:
        self._collect_loss()
        since = self.step - (self.curve[-1].step if self.curve else 0)
        test_loss, accuracy = self.evaluate()
        if self.step == self.steps and not math.isfinite(test_loss):
            raise Failed(f"the test loss is not finite at the last step, {self.step}: a smaller --lr may help")
        finite = test_loss if math.isfinite(test_loss) else None
        self.curve.append(Point(self.step, self.step / self.batches.per_epoch, self.loss / since, finite, accuracy))
        self.loss = 0.0

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test images, of which each process takes its share."""
        if self.world.size > 1:
            for buffer in self.network.buffers():  # batch statistics: rank 0's are the network's, as in DistributedDataParallel
                dist.broadcast(buffer, 0)
        share = Subset(self.data.test, range(self.world.rank, len(self.data.test), self.world.size))
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        right = torch.zeros((), dtype=torch.float64, device=self.world.device)
        self.network.eval()
        for images, classes in self._loader(share, batch_size=max(1, self.settings.batch // self.world.size)):
            known = classes.to(self.world.device)
            outputs = self._forward(self.network, images)
            loss += F.cross_entropy(outputs, known, reduction="sum")
            right += (outputs.argmax(1) == known).sum()
        self.network.train()
        loss_sum, right_sum = self.world.sums([loss, right])
        return loss_sum / len(self.data.test), right_sum / len(self.data.test)


def _check(settings: Settings, data: Data, world: World) -> None:
    share, rest = divmod(settings.batch, world.size)
    if rest:
        raise Wrong(f"--batch must be a multiple of the number of processes, {world.size}, got {settings.batch}")
    if settings.batch > len(data.training):
        raise Wrong(f"--batch must be at most {len(data.training)}, the training images of {data.name}, got {settings.batch}")
    if settings.norm == "batch" and share < 2:
        raise Wrong(f"--batch: batch norm needs at least 2 images in each process, {2 * world.size}, got {settings.batch}")
    if settings.amp == "fp16" and world.device.type != "cuda":
        raise Wrong("--amp fp16 needs a CUDA device; bf16 works on both")
    if settings.sync_batch_norm and world.device.type != "cuda":
        raise Wrong("--sync-batch-norm needs CUDA devices: torch has it for no other")


def _groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Weights decay; biases, and the scales and shifts of batch norm, which have one dimension, do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _cosine(steps: int) -> Callable[[int], float]:
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps))


def _constant(step: int) -> float:
    return 1.0
