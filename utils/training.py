"""One visible training loop over batches of a Detector, with checkpoints that resume bit-identically on the CPU."""

import logging
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import Dataset, Sampler, default_collate

from binarize.stages import attention_gates, parameter_groups
from common.errors import Interrupted, NumericError, ResourceError, UserError
from common.progress import ProgressBar
from common.schema import mapping, whole
from models.detector import Detector
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.devices import autocast
from utils.distributed import is_main, joined, on_main, peers_expected, rank, world_size
from utils.loading import loaded_batches
from utils.optim import build_optimizer, learning_rate, load_optimizer
from utils.result_files import MetricsLog
from utils.stopping import StopRequest
from utils.stored_config import EARLIER_DEFAULTS
from utils.trained_state import fitting_state

logger = logging.getLogger(__name__)

_BETA2 = 0.999


@dataclass(frozen=True)
class TrainingOptions:
    """Numbers of a training run; iterations are the unit, and `batch_size` is that of each process."""

    total_iterations: int
    batch_size: int
    warmup: int
    peak_rate: float
    final_rate: float
    weight_decay: float
    adam_eps: float
    gradient_clip: float
    seed: int
    precision: str
    num_workers: int
    save_every: int
    log_every: int
    optimizer: str = "stable_adamw"
    adam_beta1: float = 0.9
    schedule: str = "cosine"


class ShuffledBatches(Sampler):
    """Index batches of iterations start..total: each epoch a permutation by (seed, epoch), its incomplete batch dropped.

    The order depends on nothing but the arguments, so training resumes in the middle of an epoch. Several processes share
    `parts * batch_size` consecutive images of the same permutation: process number `part` takes its `batch_size` of them.
    """

    def __init__(self, count: int, batch_size: int, seed: int, start: int, total: int, part: int = 0, parts: int = 1):
        self.count, self.batch_size, self.seed, self.start, self.total = count, batch_size, seed, start, total
        self.part, self.parts = part, parts

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[int]]:
        shared = self.parts * self.batch_size
        per_epoch = self.count // shared
        epoch, order = -1, []
        for iteration in range(self.start, self.total):
            if iteration // per_epoch != epoch:
                epoch = iteration // per_epoch
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.count, generator=generator).tolist()
            position = iteration % per_epoch * shared + self.part * self.batch_size
            yield order[position : position + self.batch_size]


def first_global_batch(data: Dataset, options: TrainingOptions) -> Tensor:
    """Inputs of the first iteration of all processes together, in the order of one process with a batch of that size."""
    indices = next(iter(ShuffledBatches(len(data), options.batch_size * world_size(), options.seed, 0, 1)))
    return default_collate([data[index]["image"] for index in indices])


def iterations_per_epoch(image_count: int, batch_size: int, item: str) -> int:
    """Iterations of an epoch with that batch in each process; raises UserError if the images do not fill one."""
    processes = world_size()
    if image_count < processes * batch_size:
        several = f"{processes} processes x " if processes > 1 else ""
        smaller = f"--batch_size {image_count // processes} or smaller" if image_count >= processes else "fewer processes"
        raise UserError(
            f"{item} has {image_count} training images, fewer than {several}--batch_size {batch_size}, and incomplete "
            f"batches are dropped; give {smaller}"
        )
    return image_count // (processes * batch_size)


def fit(
    detector: Detector,
    data: Dataset,
    options: TrainingOptions,
    folder: Path,
    identity: dict,
    log: MetricsLog,
    resume: bool,
) -> None:
    """Train a detector on a data set, in place; several processes share every batch and end with equal weights.

    Args:
        folder: gets `last.pth` every `save_every` iterations, and when a signal arrives at any process.
        identity: stored in `last.pth`; a checkpoint of another identity is not resumed.
        resume: go on from `folder/last.pth` if it exists.

    Raises:
        Interrupted: after SIGINT or SIGTERM, with the checkpoint saved.
        NumericError: the loss or the gradient is not finite; the last checkpoint is kept.
        PeerLost: another process ended.
    """
    groups, betas = parameter_groups(detector, options.weight_decay), (options.adam_beta1, _BETA2)
    optimizer = build_optimizer(options.optimizer, groups, options.peak_rate, betas, options.adam_eps)
    last = folder / "last.pth"
    start = _restore(last, detector, optimizer, identity, options.total_iterations) if resume and last.is_file() else 0
    on_main(lambda: log.truncate(start))
    detector.train()
    model = _loss_module(detector)
    order = ShuffledBatches(len(data), options.batch_size, options.seed, start, options.total_iterations, rank(), world_size())
    device, began, largest_norm = detector.device, time.perf_counter(), options.gradient_clip or math.inf
    with (
        StopRequest() as stop,
        loaded_batches(data, options.num_workers, batch_sampler=order) as batches,
        ProgressBar(total=options.total_iterations, initial=start, unit="it", disable=None if is_main() else True) as bar,
    ):
        for iteration, batch in enumerate(batches, start):
            rate = _rate(options, iteration)
            for group in optimizer.param_groups:
                group["lr"] = rate
            detector.begin_iteration(iteration, options.total_iterations)
            torch.manual_seed(_noise_seed(options.seed, iteration))  # instead of a random state in every checkpoint
            optimizer.zero_grad(set_to_none=True)
            loss, parts = _backward(model, batch["image"].to(device), options)
            norm = torch.nn.utils.clip_grad_norm_(list(detector.trainable_parameters()), largest_norm).item()
            (value, *part_values), stopped = stop.agree(torch.stack([loss.detach(), *parts.values()]))
            if not math.isfinite(value) or not math.isfinite(norm):
                raise NumericError(_describe_failure(iteration, value, norm, rate, joined(batch["path"]), last))
            optimizer.step()

            done = iteration + 1
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}", lr=f"{rate:.2e}")
            if is_main() and (done % options.log_every == 0 or done == options.total_iterations):
                seconds = (time.perf_counter() - began) / (done - start)
                log.training(done, value, rate, seconds, dict(zip(parts, part_values, strict=True)))
            if done % options.save_every == 0 or done == options.total_iterations or stopped:
                on_main(lambda done=done: save_training_state(last, detector, optimizer, done, identity))
            if stopped and done < options.total_iterations:
                if is_main():
                    logger.warning("stopped at iteration %d; %s is saved, go on with --resume", done, last)
                raise Interrupted(stopped)
    _, stopped = stop.agree(torch.empty(0))  # a signal may have come while the loader processes ended
    if stopped:
        raise Interrupted(stopped)


def _rate(options: TrainingOptions, iteration: int) -> float:
    rates = options.peak_rate, options.final_rate
    return learning_rate(iteration, options.total_iterations, options.warmup, *rates, options.schedule)


def _noise_seed(seed: int, iteration: int) -> int:
    """Of dropout: it depends on nothing else, so a training resumes in the middle, and processes draw differently."""
    return (seed * 1_000_003 + iteration) * world_size() + rank()


class _TrainingLoss(nn.Module):
    """The loss of a detector as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.detector.training_loss(inputs)


def _loss_module(detector: Detector) -> nn.Module:
    """Inputs -> loss and parts; with several processes the gradients become means over all, weights start as the main's."""
    module = _TrainingLoss(detector)
    if world_size() == 1:
        return module
    frozen = [name for name, _ in module.named_parameters() if name.startswith("detector.encoder.")]
    constant = [name for name, _ in module.named_buffers()]  # set before the training, from what all processes see
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen + constant)
    fixed_gates = any(gate.mode == "binary" for gate in attention_gates(detector))  # their k and m get no gradient
    with peers_expected():
        return DistributedDataParallel(module, find_unused_parameters=fixed_gates)


def _backward(model: nn.Module, inputs: Tensor, options: TrainingOptions) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of this process's batch and its parts, with the gradients of all processes' batches computed."""
    try:
        with peers_expected():
            with autocast(inputs.device, options.precision):
                loss, parts = model(inputs)
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


def save_training_state(path: Path, detector: Detector, optimizer: Optimizer, iteration: int, identity: dict) -> None:
    """Everything that `fit` needs to go on as if it had not stopped."""
    save_checkpoint(
        path,
        {
            "model": detector.trained_state(),
            "optimizer": optimizer.state_dict(),
            "iteration": iteration,
            "processes": world_size(),
            **identity,
        },
    )


def _restore(path: Path, detector: Detector, optimizer: Optimizer, identity: dict, total_iterations: int) -> int:
    content = load_checkpoint(
        path, {"optimizer": mapping, "iteration": whole(0, sys.maxsize)}, {"processes": whole(1, sys.maxsize)}
    )
    processes = content.get("processes", 1)  # absent in files from before there were several
    if processes != world_size():
        raise UserError(
            f"cannot resume: {str(path)!r} was saved by {processes} processes, this command has {world_size()}, and batches "
            f"would differ; start it with torchrun --nproc_per_node {processes}, or start anew with --overwrite"
        )
    flags = identity.get("config", {})
    stored = {**EARLIER_DEFAULTS, **content, **content.get("config", {})}
    wanted = {**{name: value for name, value in identity.items() if name != "config"}, **flags}
    for name, expected in wanted.items():
        if stored.get(name) != expected:
            hint = ", with --cache_features off, ram or disk as auto then chose" if name == "features" else ""
            raise UserError(
                f"cannot resume: {str(path)!r} was saved with {name} {stored.get(name)!r}, this command has {expected!r}; "
                f"repeat the first command's flags{hint}, or start anew with --overwrite"
            )
    if content["iteration"] > total_iterations:
        raise UserError(
            f"checkpoint unusable: {str(path)!r} is at iteration {content['iteration']} of {total_iterations}; start anew with "
            "--overwrite"
        )
    detector.load_trained_state(fitting_state(content["model"], detector.trained_state(), path))
    load_optimizer(optimizer, content["optimizer"], path)
    logger.info("resumed from %s at iteration %d", path, content["iteration"])
    return content["iteration"]
