"""StableAdamW and the schedules: warm-up and cosine of INP-Former and Dinomaly, late step of EfficientAD."""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from common.errors import UserError
from common.schema import expected, fields, mapping, no_tensors, real, sequence_of, tensor

DEFAULT_WARMUP = 100
OPTIMIZERS = ("stable_adamw", "adamw", "adam")
SCHEDULES = ("cosine", "step")
_STEP_AT = 0.95  # of the iterations


class StableAdamW(Optimizer):
    """AdamW with amsgrad and update clipping: the step of a tensor shrinks when its gradient outgrows its second moment.

    p <- p (1 - lr wd); m, v the Adam moments, v_max the running maximum of v; denominator = sqrt(v_max) / sqrt(1 - b2^t)
    + eps; r = max(1, RMS(gradient / denominator) / clip_threshold) per tensor; p <- p - lr / ((1 - b1^t) r) m / denominator
    (Wortsman et al. 2023, in the form of the host models' training code).
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-10,
        weight_decay: float = 1e-4,
        clip_threshold: float = 1.0,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_threshold": clip_threshold,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("StableAdamW takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("first_moment", "second_moment", "second_moment_maximum"):
                state[name] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        first, second, maximum = state["first_moment"], state["second_moment"], state["second_moment_maximum"]

        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        torch.maximum(maximum, second, out=maximum)
        denominator = maximum.sqrt().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        rms = (gradient / denominator).norm() / math.sqrt(parameter.numel())
        shrink = (rms / group["clip_threshold"]).clamp_min(1.0)
        parameter.sub_(first / denominator * (group["lr"] / (1 - beta1 ** state["step"]) / shrink))


_MOMENTS = {
    StableAdamW: ("first_moment", "second_moment", "second_moment_maximum"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
}


def build_optimizer(name: str, groups: list[dict], rate: float, betas: tuple[float, float], eps: float) -> Optimizer:
    """One of `OPTIMIZERS` over parameter groups that bring their weight decay."""
    kind = {"stable_adamw": StableAdamW, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
    return kind(groups, lr=rate, betas=betas, eps=eps)


def load_optimizer(optimizer: Optimizer, stored: dict, path: Path) -> None:
    """Give a fresh optimizer the state that `state_dict` gave for another with the same numbers over the same parameters.

    Raises:
        UserError: the state in the file at `path` is of another optimizer; says what differs first.
    """
    try:
        fields({"state": _any_mapping, "param_groups": sequence_of(mapping)})(stored, "optimizer")
        no_tensors(stored["param_groups"], "optimizer.param_groups")
        groups = optimizer.param_groups
        if len(stored["param_groups"]) != len(groups):
            raise ValueError(f"it has {len(stored['param_groups'])} groups of parameters instead of {len(groups)}")
        numbered = {}
        for group, found in zip(groups, stored["param_groups"], strict=True):
            _check_group(group, found, start=len(numbered))
            numbered |= dict(zip(found["params"], group["params"], strict=True))
        for number, state in stored["state"].items():
            _check_moments(state, numbered.get(number), number, _MOMENTS[type(optimizer)])
    except ValueError as error:
        raise UserError(
            f"checkpoint unusable: the optimizer's state in {str(path)!r} does not fit ({error}); start anew with --overwrite"
        ) from error
    moments = {
        number: {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        for number, state in stored["state"].items()
    }  # in a file two of them may be one memory
    groups = [{**group, **found} for group, found in zip(optimizer.param_groups, stored["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _any_mapping(value: object, name: str) -> None:
    if not isinstance(value, dict):
        raise expected(name, "a mapping", value)


def _check_group(group: dict, found: dict, start: int) -> None:
    count = len(group["params"])
    if found.get("params") != list(range(start, start + count)):
        raise ValueError(f"it has another number of parameters than {count} in a group")
    for name, value in group.items():
        if name == "lr":  # which is set anew before each step
            real(0)(found.get(name), "lr")
        elif name != "params" and found.get(name, value) != value:  # a later torch has further settings
            raise expected(name, repr(value), found[name])


def _check_moments(state: object, parameter: Tensor | None, number: object, moments: tuple[str, ...]) -> None:
    if parameter is None:
        raise ValueError(f"it has a state for {number!r}, which is no parameter")
    fields({"step": _step, **dict.fromkeys(moments, tensor)})(state, f"state[{number}]")
    for name in moments:
        value = state[name]
        if value.dtype != parameter.dtype or value.shape != parameter.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and {value.dtype} for a parameter of shape {tuple(parameter.shape)} "
                f"and {parameter.dtype}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")


def _step(value: object, name: str) -> None:
    real(0)(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value, name)


def warmup_length(total_iterations: int, wanted: int = DEFAULT_WARMUP) -> int:
    """`wanted` warm-up iterations, but at most a fifth of a short run, which would otherwise be all warm-up."""
    return min(wanted, total_iterations // 5)


def learning_rate(
    iteration: int, total_iterations: int, warmup: int, peak: float, final: float, schedule: str = "cosine"
) -> float:
    """Rate of a 0-based iteration: linspace(0, peak) over the warm-up (the first step has rate 0), then cosine to final.

    With the schedule `step` the rate stays at the peak after the warm-up and is final in the last 5 % of the iterations.
    """
    if iteration < warmup:
        return peak * iteration / max(1, warmup - 1)
    if schedule == "step":
        return peak if iteration < int(_STEP_AT * total_iterations) else final
    progress = (iteration - warmup) / max(1, total_iterations - warmup)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))
