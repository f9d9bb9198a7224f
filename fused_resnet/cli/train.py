"""Train a network of fused_resnet.models on digits, MNIST's images or a folder of images.

    python -m fused_resnet train --model cifar20 --data digits --out run
    torchrun --standalone --nproc-per-node 2 -m fused_resnet train --model cifar20 --data digits --out run

Under torchrun the processes share each batch (DistributedDataParallel; gloo between CPUs, NCCL between CUDA devices) and do
together what one process does alone, but for batch norm, whose statistics are of each process's share. With --out the run can be
cut off at any moment: the same command continues at the last checkpoint. Exit status 1 if the loss is not finite any more, or
the disk is full; the last checkpoint is whole then.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import _machine
from ..benchmark.output import progress, table, write_json
from ..training import Failed, Settings, Training, World, Wrong, checkpoint, folder
from ..training.data import SETS, Data, bundled
from ..training.loop import AMP, FORMATS
from ..training.settings import IMAGENET, cifar_depth
from ..training.world import join
from .arguments import Usage, add_json, need, positive, seed, threads

HELP = "train a network, in one process or several, with checkpoints"

ROWS = 12  # of the table: the last ones


def number(text: str) -> float:
    """An argument type: a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_off = argparse.BooleanOptionalAction
    parser.add_argument("--model", default="cifar20", help=f"{', '.join(IMAGENET)}, or cifarN with N = 6n + 2 (default: cifar20)")
    parser.add_argument("--shortcut", choices=("A", "B", "C"), help="of cifarN: zero-padding, projection, projections only (default: A)")
    parser.add_argument("--plain", action="store_true", help="cifarN without its shortcuts")
    parser.add_argument("--norm", choices=("batch", "none"), default="batch", help="none: convolutions with biases (default: batch)")
    parser.add_argument("--zero-init", action=on_off, help="each block starts as its shortcut (default: without norm)")
    parser.add_argument("--sync-batch-norm", action="store_true", help="batch statistics of all processes; CUDA only")
    parser.add_argument("--data", choices=(*SETS, "folder"), default="digits", help="default: digits")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="of --data folder: it, or train and val in it, has a folder a class")
    parser.add_argument("--image-size", type=positive, help="of --data folder, in pixels (default: 224; cifarN: 32)")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be decoded, and name them")
    parser.add_argument("--augment", action=on_off, help="random crops and mirror images (default: of a folder)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, help="default: 10")
    length.add_argument("--steps", type=positive, help="instead of epochs")
    parser.add_argument("--batch", type=positive, default=64, help="images at each step, of all processes together (default: 64)")
    parser.add_argument("--lr", type=number, default=0.05, help="learning rate (default: 0.05)")
    parser.add_argument("--momentum", type=number, default=0.9, help="default: 0.9")
    parser.add_argument("--weight-decay", type=number, default=1e-4, help="of weights; not of biases and batch norm (default: 1e-4)")
    parser.add_argument("--schedule", choices=("cosine", "constant"), default="cosine", help="of the learning rate (default: cosine)")
    parser.add_argument("--amp", choices=tuple(AMP), default="off", help="mixed precision; fp16 on CUDA only (default: off)")
    parser.add_argument("--memory-format", choices=tuple(FORMATS), default="channels_last", help="default: channels_last")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--threads", type=positive, help="of each process (default: torch's)")
    parser.add_argument("--workers", type=int, choices=range(65), default=0, metavar="N", help="processes that read images (default: 0)")
    parser.add_argument("--seed", type=seed, default=0, help="of weights, order and augmentation (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of checkpoints and the curve; a run that is there continues")
    parser.add_argument("--checkpoint-every", type=positive, metavar="STEPS", help="default: after each epoch")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    need("numpy", "study")
    try:
        _check_words(arguments)
        with threads(arguments.threads), join(arguments.device) as world:
            report = _train(arguments, world)
            if world.rank == 0:
                write_json(arguments.json, report)
    except Wrong as error:
        if error.told:
            return 2
        raise Usage(str(error)) from None
    except Failed as error:
        if not error.told:
            # Out of a DataLoader's worker it comes with that process's traceback in front.
            print(f"fused-resnet: {str(error).strip().rsplit('Failed: ', 1)[-1]}", file=sys.stderr)
        return 1
    return 0


def _check_words(arguments: argparse.Namespace) -> None:
    is_folder = arguments.data == "folder"
    if is_folder != (arguments.folder is not None):
        raise Usage("--data folder and --folder DIR must come together")
    if not is_folder and (arguments.image_size is not None or arguments.skip_corrupt):
        raise Usage("--image-size and --skip-corrupt are of --data folder")
    if is_folder:
        need("PIL", "study")
    if cifar_depth(arguments.model) is None and (arguments.shortcut is not None or arguments.plain):
        raise Usage(f"--shortcut and --plain are of cifarN, got --model {arguments.model}")
    if arguments.sync_batch_norm and arguments.norm != "batch":
        raise Usage("--sync-batch-norm needs --norm batch")
    if arguments.momentum >= 1:
        raise Usage(f"--momentum must be below 1, got {arguments.momentum:g}")
    if arguments.image_size is not None and arguments.image_size < 8:
        raise Usage(f"--image-size must be at least 8, got {arguments.image_size}")
    if arguments.checkpoint_every is not None and arguments.out is None:
        raise Usage("--checkpoint-every needs --out DIR")


def _settings(arguments: argparse.Namespace, images: str) -> Settings:
    is_folder = arguments.data == "folder"
    size = arguments.image_size or (224 if cifar_depth(arguments.model) is None else 32)
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings) if field.name != "images"}
    given |= {
        "shortcut": arguments.shortcut or "A",
        "zero_init": arguments.norm == "none" if arguments.zero_init is None else arguments.zero_init,
        "image_size": size if is_folder else None,
        "augment": is_folder if arguments.augment is None else arguments.augment,
        "epochs": arguments.epochs if arguments.steps else arguments.epochs or 10,
    }
    return Settings(images=images, **given)


def _train(arguments: argparse.Namespace, world: World) -> dict[str, Any]:
    """Everything in its order: what can be wrong is looked at before the first step, what is already there before anything."""

    def say(sentence: str) -> None:
        if world.rank == 0:
            print(sentence, flush=True)

    found = world.together(lambda: folder.find(arguments.folder)) if arguments.folder else None
    settings = _settings(arguments, world.first(found.digest) if found else arguments.data)
    with _opened(arguments.out, world) as out:
        saved = world.first(lambda: out.load(settings) if out else None)
        skipped = list(saved["skipped"]) if saved else []
        if found and not saved:
            skipped = _check_files(arguments, found, settings, world, say)
        data = world.together(lambda: _data(settings, found, skipped))
        training = world.together(lambda: Training(settings, data, world, arguments.workers))
        if saved:
            world.together(lambda: training.restore(saved))
        _say_begin(training, arguments, say)
        begun = training.step

        def save() -> None:
            state = {**training.state(), "skipped": skipped}
            world.first(lambda: out.save(state, dataclasses.asdict(settings), report()) if out else None)

        def report() -> dict[str, Any]:
            return {
                "machine": _machine.describe(paths=False),
                "settings": dataclasses.asdict(settings),
                "processes": world.size,
                "device": world.device.type,
                "parameters": sum(p.numel() for p in training.network.parameters()),
                "images": [len(data.training), len(data.test)],
                "skipped": skipped,
                "continued_at": begun,
                "step": training.step,
                "steps": training.steps,
                "seconds": training.seconds,
                "curve": [dataclasses.asdict(point) for point in training.curve],
            }

        with _bar(world, training.steps - begun, "training") as advance:
            training.run(arguments.checkpoint_every, save, advance)
        _say_end(training, arguments, say)
        return report()


@contextmanager
def _opened(path: Path | None, world: World) -> Iterator[checkpoint.Folder | None]:
    """The folder, opened by rank 0, which alone reads and writes there; None elsewhere, or without --out."""
    out: list[checkpoint.Folder] = []
    if path is not None:
        world.first(lambda: out.append(checkpoint.Folder(path)))
    try:
        yield out[0] if out else None
    finally:
        if out:
            out[0].close()


@contextmanager
def _bar(world: World, total: int, what: str) -> Iterator[Callable[[str], None]]:
    if world.rank > 0 or total < 1:
        yield lambda note: None
        return
    with progress(total, what) as advance:
        yield advance


def _check_files(
    arguments: argparse.Namespace, found: folder.Found, settings: Settings, world: World, say: Callable[[str], None]
) -> list[str]:
    """The names of the files to leave out."""
    assert settings.image_size is not None
    with _bar(world, len(found.files[:: world.size]), "checking images") as advance:
        broken = folder.check(found, settings.image_size, world, advance)

    def refuse() -> None:
        if broken and not arguments.skip_corrupt:
            more = f", and {len(broken) - 1} more like it" if len(broken) > 1 else ""
            name, reason = broken[0]
            raise Wrong(f"{found.root / name} cannot be decoded ({reason}){more}: repair it, or --skip-corrupt")

    world.first(refuse)
    for name, reason in broken:
        say(f"skipped  {found.root / name}: {reason}")
    return [name for name, _ in broken]


def _data(settings: Settings, found: folder.Found | None, skipped: list[str]) -> Data:
    if found is None:
        return bundled(settings.images)
    assert settings.image_size is not None
    return folder.data(found, skipped, settings.image_size)


def _say_begin(training: Training, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    settings, data, world = training.settings, training.data, training.world
    count = sum(p.numel() for p in training.network.parameters())
    plural = "es" if world.size > 1 else ""
    say(
        f"{settings.model}{' plain' if settings.plain else ''} ({count:,} parameters) on {data.name}: {len(data.training)} images, "
        f"{len(data.test)} more for the test, {len(data.classes)} classes; {training.steps} steps of {settings.batch} images, "
        f"{world.size} process{plural}, {world.device.type}"
    )
    if training.step >= training.steps:
        say(f"{arguments.out} holds this run at its end: step {training.step}")
    elif training.step:
        say(f"continues at step {training.step} of {training.steps}, from {arguments.out}")
    elif arguments.out is None:
        say("no checkpoints are written: there is no --out")


def _say_end(training: Training, arguments: argparse.Namespace, say: Callable[[str], None]) -> None:
    rows = [
        (
            point.step,
            f"{point.epoch:.4g}",
            f"{point.loss:.4f}",
            "not finite" if point.test_loss is None else f"{point.test_loss:.4f}",
            f"{point.test_accuracy:.2%}",
        )
        for point in training.curve[-ROWS:]
    ]
    say(table(("step", "epoch", "loss", "test loss", "test accuracy"), rows))
    where = f"; checkpoint and curve in {arguments.out}" if arguments.out else ""
    say(f"{training.step} steps in {training.seconds:.1f} s{where}")
