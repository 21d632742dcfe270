"""One visible training loop over batches of a Detector, with checkpoints that resume bit-identically on the CPU."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from binarize.stages import parameter_groups
from common.errors import Interrupted, NumericError, ResourceError, UserError
from models.detector import Detector
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.devices import autocast, random_state, restore_random_state
from utils.loading import loaded_batches
from utils.optim import StableAdamW, learning_rate
from utils.result_files import MetricsLog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingOptions:
    """Numbers of a training run; iterations are the unit."""

    total_iterations: int
    batch_size: int
    warmup: int
    peak_rate: float
    final_rate: float
    weight_decay: float
    gradient_clip: float
    seed: int
    precision: str
    num_workers: int
    save_every: int
    log_every: int


class ShuffledBatches(Sampler):
    """Index batches of iterations start..total: each epoch a permutation by (seed, epoch), its incomplete batch dropped.

    The order depends on nothing but the arguments, so training resumes in the middle of an epoch.
    """

    def __init__(self, count: int, batch_size: int, seed: int, start: int, total: int):
        self.count, self.batch_size, self.seed, self.start, self.total = count, batch_size, seed, start, total

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.count // self.batch_size
        epoch, order = -1, []
        for iteration in range(self.start, self.total):
            if iteration // per_epoch != epoch:
                epoch = iteration // per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.count, generator=generator).tolist()
            position = iteration % per_epoch * self.batch_size
            yield order[position : position + self.batch_size]


def iterations_of(epochs: int, image_count: int, batch_size: int, item: str) -> int:
    """Iterations of so many epochs; raises UserError if the images do not fill one batch."""
    if image_count < batch_size:
        raise UserError(
            f"{item} has {image_count} training images, fewer than --batch_size {batch_size}, and incomplete batches are "
            f"dropped; give --batch_size {image_count} or smaller"
        )
    return epochs * (image_count // batch_size)


@dataclass
class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag, so that the loop can save; the second one ends at once."""

    signal_number: int | None = None
    _previous: dict = field(default_factory=dict)

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.signal_number is not None:
            raise Interrupted(number)
        self.signal_number = number


def fit(
    detector: Detector,
    data: Dataset,
    options: TrainingOptions,
    folder: Path,
    identity: dict,
    log: MetricsLog,
    resume: bool,
) -> None:
    """Train a detector on a data set, in place.

    Args:
        folder: gets `last.pth` every `save_every` iterations, and when a signal arrives.
        identity: stored in `last.pth`; a checkpoint of another identity is not resumed.
        resume: go on from `folder/last.pth` if it exists.

    Raises:
        Interrupted: after SIGINT or SIGTERM, with the checkpoint saved.
        NumericError: the loss or the gradient is not finite; the last checkpoint is kept.
    """
    optimizer = StableAdamW(parameter_groups(detector, options.weight_decay), lr=options.peak_rate)
    last = folder / "last.pth"
    start = _restore(last, detector, optimizer, identity) if resume and last.is_file() else 0
    log.truncate(start)
    detector.train()
    order = ShuffledBatches(len(data), options.batch_size, options.seed, start, options.total_iterations)
    device, began = detector.device, time.perf_counter()
    with (
        StopRequest() as stop,
        loaded_batches(data, options.num_workers, batch_sampler=order) as batches,
        tqdm(total=options.total_iterations, initial=start, unit="it", disable=None) as bar,
    ):
        for iteration, batch in enumerate(batches, start):
            rate = learning_rate(iteration, options.total_iterations, options.warmup, options.peak_rate, options.final_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss, parts = _backward(detector, batch["image"].to(device), options)
            norm = torch.nn.utils.clip_grad_norm_(list(detector.trainable_parameters()), options.gradient_clip)
            value = loss.item()
            if not math.isfinite(value) or not math.isfinite(norm.item()):
                raise NumericError(_describe_failure(iteration, value, norm.item(), rate, batch["path"], last))
            optimizer.step()

            done = iteration + 1
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}", lr=f"{rate:.2e}")
            if done % options.log_every == 0 or done == options.total_iterations:
                seconds = (time.perf_counter() - began) / (done - start)
                log.training(done, value, rate, seconds, {name: part.item() for name, part in parts.items()})
            if done % options.save_every == 0 or done == options.total_iterations or stop.signal_number:
                save_training_state(last, detector, optimizer, done, identity)
            if stop.signal_number and done < options.total_iterations:
                logger.warning("stopped at iteration %d; %s is saved, go on with --resume", done, last)
                raise Interrupted(stop.signal_number)
    if stop.signal_number:
        raise Interrupted(stop.signal_number)


def _backward(detector: Detector, inputs: Tensor, options: TrainingOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a batch and its parts, with the gradients computed."""
    try:
        with autocast(inputs.device, options.precision):
            loss, parts = detector.training_loss(inputs)
        loss.backward()
        return loss, parts
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"out of device memory with --batch_size {options.batch_size}; lower it (results change with it), "
            "or give --precision bf16"
        ) from error


def _describe_failure(iteration: int, loss: float, norm: float, rate: float, paths: list[str], last: Path) -> str:
    kept = f"the last good checkpoint is {str(last)!r}" if last.is_file() else "no checkpoint had been saved yet"
    return (
        f"training diverged: loss {loss}, gradient norm {norm} at iteration {iteration} (learning rate {rate:.2e}), "
        f"batch of {', '.join(repr(path) for path in paths)}; {kept}; lower --learning_rate or look at these images"
    )


def save_training_state(path: Path, detector: Detector, optimizer: StableAdamW, iteration: int, identity: dict) -> None:
    """Everything that `fit` needs to go on as if it had not stopped."""
    save_checkpoint(
        path,
        {
            "model": detector.trained_state(),
            "optimizer": optimizer.state_dict(),
            "iteration": iteration,
            "random_state": random_state(),
            **identity,
        },
    )


def _restore(path: Path, detector: Detector, optimizer: StableAdamW, identity: dict) -> int:
    content = load_checkpoint(path)
    for name, expected in identity.items():
        if content.get(name) != expected:
            raise UserError(
                f"cannot resume: {str(path)!r} was saved with {name} {content.get(name)!r}, this command has {expected!r}; "
                "repeat the first command's flags, or start anew with --overwrite"
            )
    detector.load_trained_state(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    restore_random_state(content["random_state"])
    logger.info("resumed from %s at iteration %d", path, content["iteration"])
    return content["iteration"]
