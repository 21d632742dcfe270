"""Which runs belong together: those that differ in their seed alone, and a binary run with its float run."""

import re
from collections.abc import Sequence

from utils.hosts import HOSTS
from utils.run_results import Part, Run, folder_name
from utils.settings import IDENTITY_KEYS, PROTOCOL_KEYS

# what a run shares with the float run that it is compared with, beside its network and its training data
_FLOAT_KEYS = (
    "setting", "dataset", "realiad_json", "skip_bad_images", "shot", "per_category", "seed", "encoder", "pos_embed",
    "input_size", "crop_size", "interpolation", "holdout", "precision", *PROTOCOL_KEYS,
)  # fmt: skip
# names of other runs, which carry their seed
_REFERENCES = ("load_checkpoint", "distill_teacher", "test_checkpoint", "baseline")


def but_for_seed(run: Run) -> dict:
    """All that determines a run's numbers, without its seed and without the seed in the names it refers to."""
    config = run.config
    named = {key: config.get(key) and _without_seed(config[key], config["seed"]) for key in _REFERENCES}
    left_out = ("seed", "batch_size", *_REFERENCES)  # the batch of all processes together counts
    kept = {key: config.get(key) for key in (*IDENTITY_KEYS, *PROTOCOL_KEYS) if key not in left_out}
    return {**kept, **named, **run.training_data, "weights": run.weights, "test": folder_name(run)[1:]}


def shared_name(runs: Sequence[Run]) -> str:
    """Name of runs that differ in their seed: without it if that makes all names equal, else the first one's."""
    if len(runs) == 1:
        return runs[0].name
    names = {_without_seed(run.name, run.config["seed"]) for run in runs}
    return (names.pop() if len(names) == 1 else "") or runs[0].name


def _without_seed(name: str, seed: int) -> str:
    """`seed2-multi` and `multi-seed2` are `multi`, `multi-seed2-FP` is `multi-FP`; also within a path."""
    return re.sub(rf"(?<![^/])seed{seed}[-_]|[-_]?seed{seed}(?!\d)", "", name)


def float_of(part: Part, parts: Sequence[Part]) -> Part | None:
    """The stage-0 run that a binary run compares with: same network, data, batch, seed, sizes and the like.

    Of several the best is as long, and then trained with the same flags of its host.
    """
    config = part.run.config
    if config["clb_stage"] == 0:
        return None
    wanted = _compared_by(part.run)
    candidates = [other for other in parts if other.run.config["clb_stage"] == 0 and _compared_by(other.run) == wanted]

    def likeness(other: Part) -> list[bool]:
        lengths, training = ("total_iters", "total_epochs"), HOSTS[part.run.host].training_flags
        return [all(other.run.config.get(key) == config.get(key) for key in keys) for keys in (lengths, training)]

    return max(candidates, key=likeness, default=None)


def _compared_by(run: Run) -> dict:
    shared = {key: run.config.get(key) for key in _FLOAT_KEYS}
    return {**shared, **run.training_data, "network": run.network, "weights": run.weights, "measured": _measured(run)}


def _measured(run: Run) -> tuple[str, ...]:
    """What a test measured otherwise than the training did (forced gates aside: float has none), and zero-shot's source."""
    training, *test = folder_name(run)
    changed = re.sub(r"_gate=[^_]*$", "", "".join(test)).removeprefix("test")
    return changed, *re.findall(r"_Source=(.*)_Target=", training)
