"""Distil a teacher: a patch description network learns to describe images as a large frozen network does.

Recipe of EfficientAD (Batzner et al., WACV 2024, appendix A): targets normalised by channel, squared error, Adam.
"""

import hashlib
import logging
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from common import schema
from common.errors import Interrupted, NumericError, UserError
from common.progress import ProgressBar
from datasets.images import DEFAULT_MAX_PIXELS
from models.feature_sources import FeatureSource
from models.patch_description import TEACHER_CHANNELS, PatchDescriptionNetwork
from models.weight_files import HASH_KEY, state_sha256, with_sorted_metadata
from utils.checkpoint import atomic_write, load_checkpoint, require, save_checkpoint
from utils.devices import autocast
from utils.distillation_data import ChannelStatistics, DistillationOptions, ImagePairs, NumberedBatches
from utils.loading import loaded_batches
from utils.optim import load_optimizer
from utils.stopping import StopRequest
from utils.trained_state import fitting_state
from utils.training import iterations_per_epoch

logger = logging.getLogger(__name__)

_RECENT = 100  # iterations whose mean loss is reported
_NEEDS = {
    "optimizer": schema.mapping,
    "iteration": schema.whole(0, sys.maxsize),
    "losses": schema.sequence_of(schema.real(), 0, _RECENT),
    "statistics": schema.fields(
        {
            "total": schema.tensor,
            "squares": schema.tensor,
            "images": schema.whole(0, sys.maxsize),
            "pixels": schema.whole(0, sys.maxsize),
        }
    ),
}


class Distillation:
    """A teacher in the making, and its state file `<output>.state.pth`, from which it resumes bit for bit on the CPU.

    Args:
        source: the network to learn from, on `device`.
        images: files and the names by which a resumed run knows them again.
        output: the teacher's file.

    Raises:
        UserError: there are too few images for a batch.
    """

    def __init__(
        self,
        source: FeatureSource,
        images: dict[Path, Path],
        options: DistillationOptions,
        output: Path,
        device: torch.device,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ):
        iterations_per_epoch(len(images), options.batch_size, "--images")
        self.source, self.options, self.output, self.device = source, options, output, device
        self.data = ImagePairs(list(images), options, max_pixels)
        self.state_file = state_file(output)
        names = "\n".join(str(name) for name in images.values())
        self.identity = {**asdict(options), "images": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()}
        torch.manual_seed(options.seed)
        self.network = PatchDescriptionNetwork(options.size, TEACHER_CHANNELS[options.size], padding=True).to(device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.statistics = ChannelStatistics(TEACHER_CHANNELS[options.size])
        self.iteration, self.losses = 0, []

    @property
    def recent_loss(self) -> float:
        """Mean over the last iterations."""
        return sum(self.losses) / len(self.losses)

    def save(self) -> None:
        """Write the state file."""
        save_checkpoint(
            self.state_file,
            {
                "stage": "distillation",
                "config": self.identity,
                "encoder": self.source.name,
                "encoder_sha256": self.source.weights_sha256,
                "model": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "statistics": vars(self.statistics),
                "iteration": self.iteration,
                "losses": self.losses,
            },
        )

    def restore(self) -> None:
        """Go on from the state file; raises UserError if it is damaged or was saved with other settings."""
        content = load_checkpoint(self.state_file)
        if content["stage"] != "distillation":
            raise UserError(f"cannot resume: {str(self.state_file)!r} is no distillation's state; choose another --output")
        require(content, _NEEDS, self.state_file)
        stored = {**content["config"], "source": content["encoder"], "weights of the source": content["encoder_sha256"]}
        wanted = {**self.identity, "source": self.source.name, "weights of the source": self.source.weights_sha256}
        for name, value in wanted.items():
            if stored.get(name) != value:
                raise UserError(
                    f"cannot resume: {str(self.state_file)!r} was saved with {name} {stored.get(name)!r}, this command has "
                    f"{value!r}; repeat the first command's flags, or choose another --output"
                )
        self.network.load_state_dict(fitting_state(content["model"], self.network.state_dict(), self.state_file))
        load_optimizer(self.optimizer, content["optimizer"], self.state_file)
        sums = {name: getattr(self.statistics, name) for name in ("total", "squares")}
        fitting_state({name: content["statistics"][name] for name in sums}, sums, self.state_file)
        vars(self.statistics).update(content["statistics"])
        self.iteration, self.losses = content["iteration"], content["losses"]
        logger.info("resumed from %s at iteration %d", self.state_file, self.iteration)

    def run(self, iterations: int, num_workers: int = 0, save_every: int = 1000) -> None:
        """Measure the channels' statistics, train up to `iterations`, write the teacher.

        Raises:
            Interrupted: after SIGINT or SIGTERM, with the state saved.
            NumericError: the loss is not finite; the last state is kept.
            UserError: an image cannot be read.
        """
        if self.iteration > iterations:
            raise UserError(
                f"{str(self.state_file)!r} is at iteration {self.iteration} already, beyond --iterations {iterations}; "
                "raise that, or choose another --output"
            )
        with StopRequest() as stop:
            self._measure_statistics(stop, num_workers)
            self._train(stop, iterations, num_workers, save_every)
            self._end_if_asked(stop)  # a signal may have come while the loader processes ended
        self.export()

    def _measure_statistics(self, stop: StopRequest, num_workers: int) -> None:
        count, wanted = len(self.data.paths), min(len(self.data.paths), self.options.statistics_images)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.options.seed))[:wanted].tolist()
        draws = [(index, -number) for number, index in enumerate(order, start=1)][self.statistics.images :]
        if not draws:
            return
        batches = [draws[start : start + self.options.batch_size] for start in range(0, len(draws), self.options.batch_size)]
        with (
            loaded_batches(self.data, num_workers, batch_sampler=batches) as loaded,
            ProgressBar(total=wanted, initial=self.statistics.images, desc="statistics", unit="image", disable=None) as bar,
        ):
            for batch in loaded:
                self.statistics.add(self.source(batch["large"].to(self.device)))
                bar.update(len(batch["path"]))
                self._end_if_asked(stop)
        self.save()

    def _train(self, stop: StopRequest, iterations: int, num_workers: int, save_every: int) -> None:
        mean, std = (values.to(self.device) for values in self.statistics.mean_and_std())
        order = NumberedBatches(len(self.data.paths), self.options.batch_size, self.options.seed, self.iteration, iterations)
        began, first = time.perf_counter(), self.iteration
        with (
            loaded_batches(self.data, num_workers, batch_sampler=order) as loaded,
            ProgressBar(total=iterations, initial=first, desc="distilling", unit="it", disable=None) as bar,
        ):
            for batch in loaded:
                target = (self.source(batch["large"].to(self.device)) - mean) / std
                with autocast(self.device, self.options.precision):
                    output = self.network(batch["image"].to(self.device))
                loss = F.mse_loss(output.float(), target)
                self._update(loss, batch["path"])
                bar.update()
                bar.set_postfix(loss=f"{self.recent_loss:.4f}")
                if self.iteration % _RECENT == 0 or self.iteration == iterations:
                    seconds = (time.perf_counter() - began) / (self.iteration - first)
                    logger.info(
                        "iteration %d of %d: loss %.4f, %.3f s per iteration",
                        self.iteration,
                        iterations,
                        self.recent_loss,
                        seconds,
                    )
                if self.iteration % save_every == 0 or self.iteration == iterations:
                    self.save()
                self._end_if_asked(stop)

    def _update(self, loss: Tensor, paths: list[str]) -> None:
        value = loss.item()
        if not math.isfinite(value):
            kept = f"{str(self.state_file)!r} keeps an earlier iteration" if self.state_file.is_file() else "no state was saved"
            raise NumericError(
                f"the loss is {value} at iteration {self.iteration}, batch of {', '.join(map(repr, paths))}; {kept}; lower "
                "--learning_rate or look at these images"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.iteration += 1
        self.losses = [*self.losses, value][-_RECENT:]

    def _end_if_asked(self, stop: StopRequest) -> None:
        if stop.signal_number is not None:
            self.save()
            logger.warning("stopped at iteration %d; %s is saved, go on with --resume", self.iteration, self.state_file)
            raise Interrupted(stop.signal_number)

    def export(self) -> None:
        """Write the teacher's file, with what it was made of as metadata."""
        count = len(self.data.paths)
        state = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        metadata = {
            HASH_KEY: state_sha256(state),
            "source": f"distilled from {self.source.source}: {count} images, {self.iteration} iterations of "
            f"{self.options.batch_size}, seed {self.options.seed}",
            "feature_source": self.source.name,
            "feature_source_sha256": self.source.weights_sha256,
            "image_count": count,
            "images_sha256": self.identity["images"],
            "iterations": self.iteration,
            "loss": self.recent_loss,
            **asdict(self.options),
        }
        content = with_sorted_metadata(safetensors.torch.save(state, {name: str(value) for name, value in metadata.items()}))
        atomic_write(self.output, lambda file: file.write(content))


def state_file(output: Path) -> Path:
    """Where the state of the distillation into `output` lies."""
    return output.with_name(f"{output.name}.state.pth")
