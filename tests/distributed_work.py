"""What the tests of several processes let them do: distributed_work.py FOLDER. Results go to files in that folder."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from binarize.linear import BinarizationOptions
from binarize.stages import binarize, binary_layers, calibrate
from models.build import RANDOM_TINY_ENCODER, build_encoder, build_inp_former
from models.losses import hard_mining_loss, soft_mining_loss
from utils.distributed import process_group, rank, world_size
from utils.result_files import MetricsLog
from utils.training import TrainingOptions, first_global_batch, fit

# CLB stage, --sab and seed. Batches of two sizes are rounded differently, and a value that is within rounding of a binary
# layer's threshold falls on either side of it: on some CPU one seed may meet such a value, hardly two
KINDS = {
    "float": (0, "mixed", 1),
    "stage-2": (2, "mixed", 1),
    "stage-2, another seed": (2, "mixed", 2),
    "constant-gates": (1, "binary", 1),
}
ITERATIONS = 8
GLOBAL_BATCH = 4
HARD_SHARE = 0.5


class Noise(Dataset):
    """11 seeded images of very different contrast, so that every part of a batch has another mean distance."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {"image": torch.randn(3, 56, 56, generator=generator) * (0.1 + index % 5), "path": f"{index}.png"}


def train(folder: Path, kind: str) -> None:
    """Train a detector on global batches; log, thresholds after calibration and final weights go to `folder`."""
    stage, sab, seed = KINDS[kind]
    # only a float detector may start differently: the others are calibrated before the main process's weights reach all
    torch.manual_seed(rank() if stage == 0 else 0)
    detector = build_inp_former(build_encoder(RANDOM_TINY_ENCODER, 56), 6)
    binarize(detector, stage, BinarizationOptions(sab=sab))
    options = TrainingOptions(
        total_iterations=ITERATIONS,
        batch_size=GLOBAL_BATCH // world_size(),
        warmup=2,
        peak_rate=1e-3,
        final_rate=1e-4,
        weight_decay=1e-4,
        adam_eps=1e-10,
        gradient_clip=0.1,
        seed=seed,
        precision="fp32",
        num_workers=0,
        save_every=1000,
        log_every=1,
    )
    data = Noise()
    calibrate(detector, first_global_batch(data, options))
    thresholds = {str(index): layer.threshold.detach().numpy() for index, layer in enumerate(binary_layers(detector))}
    np.savez(folder / f"{kind}_thresholds_{rank()}.npz", **thresholds)
    fit(detector, data, options, folder / kind, {}, MetricsLog(folder / f"{kind}.jsonl", kind), resume=False)
    torch.save(detector.trained_state(), folder / f"{kind}_{rank()}.pth")


def mine(folder: Path) -> None:
    """Losses and gradients of this process's half of the tensors in mining.npz, in float64."""
    tensors = np.load(folder / "mining.npz")
    target, reconstruction = (torch.tensor(tensors[name]).chunk(2)[rank()] for name in ("target", "reconstruction"))
    for name, mining_loss in (("soft", soft_mining_loss), ("hard", partial(hard_mining_loss, mined_share=HARD_SHARE))):
        rebuilt = reconstruction.clone().requires_grad_()
        loss = mining_loss(target, rebuilt)
        loss.backward()
        np.savez(folder / f"{name}_mining_{rank()}.npz", loss=loss.item(), gradient=rebuilt.grad.numpy())


if __name__ == "__main__":
    with process_group():
        mine(Path(sys.argv[1]))
        for name in KINDS:
            train(Path(sys.argv[1]), name)
