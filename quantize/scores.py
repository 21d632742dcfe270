"""How much each layer asks for bits: what the student fails to imitate (HQS), and the rivals' orthogonality and curvature.

A pair is a layer of the teacher and the same layer of the student; maps are (B, c, h, w), a patch is one of their B x h x w
vectors. Sums are float64 and grow with channels, not with images.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.patch_description import PatchDescriptionNetwork

INPUTS = ("own", "teacher")
TAPS = ("pre", "post")
Pair = tuple[Tensor, Tensor]
_RIDGE = 1e-8  # of the mean variance of the student's channels: decides where channels are dead or equal, and nothing else
_CHUNK = 2**20  # values of a feature map that are float64 at a time


@torch.no_grad()
def layer_outputs_of(
    teacher: PatchDescriptionNetwork,
    student: PatchDescriptionNetwork,
    batches: Iterable[Tensor],
    input: str = "own",
    tap: str = "pre",
    normalise: Callable[[Tensor], Tensor] = lambda maps: maps,
) -> Iterator[list[Pair]]:
    """For each batch of images (B, 3, S, S) the outputs of teacher and student, a pair (B, c, h, w) per layer.

    A student's layer with more channels than the teacher's counts with its first ones: those imitate the teacher.

    Args:
        input: `own` lets each network see its own previous layer; `teacher` gives both the teacher's (RAAD, Eq. 4, to the
            letter) wherever the student's convolution takes as many channels.
        tap: outputs of the convolutions before (`pre`) or after (`post`) their ReLU.
        normalise: what the student's last layer is trained to imitate, from the teacher's last output.

    Raises:
        ValueError: another input or tap.
    """
    if input not in INPUTS or tap not in TAPS:
        raise ValueError(f"input {input!r} at tap {tap!r}: inputs are {INPUTS}, taps are {TAPS}")
    for images in batches:
        of_teacher, of_student = teacher.layer_outputs(images), student.layer_outputs(images)
        if input == "teacher":
            seen = zip(student.convolutions, _layer_inputs(teacher, images), of_student, strict=True)
            of_student = [_output_for(convolution, maps, own) for convolution, maps, own in seen]
        if tap == "post":
            of_teacher, of_student = _rectified(teacher, of_teacher), _rectified(student, of_student)
        of_teacher[-1] = normalise(of_teacher[-1])
        yield [(first, second[:, : first.shape[1]]) for first, second in zip(of_teacher, of_student, strict=True)]


def _layer_inputs(network: PatchDescriptionNetwork, images: Tensor) -> list[Tensor]:
    inputs: list[Tensor] = []
    hooks = [
        convolution.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        for convolution in network.convolutions
    ]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _output_for(convolution: nn.Module, maps: Tensor, own_output: Tensor) -> Tensor:
    return convolution.before_activation(maps) if convolution.weight.shape[1] == maps.shape[1] else own_output


def _rectified(network: PatchDescriptionNetwork, outputs: list[Tensor]) -> list[Tensor]:
    layers = zip(network.convolutions, outputs, strict=True)
    return [F.relu(output) if convolution.rectified else output for convolution, output in layers]


class _SquaredErrors:
    """Sums of squared differences and of the teacher's squares."""

    def __init__(self) -> None:
        self.count, self.error, self.teacher = 0, 0.0, 0.0

    def add(self, teacher: Tensor, student: Tensor) -> None:
        """Maps (c, h, w) of one image."""
        teacher = teacher.double()
        self.count += teacher.numel()
        self.error += (teacher - student).square().sum().item()
        self.teacher += teacher.square().sum().item()


class _Covariances:
    """Count, means (c + c') and centred products (c + c', c + c') of the patches of both networks side by side."""

    def __init__(self) -> None:
        self.count, self.channels = 0, 0
        self.mean = self.products = torch.zeros(())

    def add(self, teacher: Tensor, student: Tensor) -> None:
        """Maps (c, h, w) and (c', h, w) of one image."""
        patches = torch.cat([teacher, student]).double().flatten(1)  # (c + c', patches)
        mean, count = patches.mean(dim=1), patches.shape[1]
        centred = patches - mean[:, None]
        if not self.count:
            self.channels, self.mean, self.products = len(teacher), torch.zeros_like(mean), torch.zeros_like(mean).diag()
        # parts merged as in Chan et al. 1983: nothing large is subtracted from something large
        distance, total = mean - self.mean, self.count + count
        self.products += centred @ centred.T + torch.outer(distance, distance) * (self.count * count / total)
        self.mean += distance * (count / total)
        self.count = total

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher with teacher, student with teacher, student with student."""
        c = self.channels
        return self.products[:c, :c], self.products[c:, :c], self.products[c:, c:]


def _relative_error(sums: _SquaredErrors) -> float:
    total = sums.error + sums.teacher
    return sums.error / total if total else 0.0


def _raw_error(sums: _SquaredErrors) -> float:
    return sums.error / sums.count


def _misalignment(sums: _Covariances) -> float:
    of_teacher, across, of_student = sums.parts()
    scale = (of_teacher.norm() * of_student.norm()).item()
    return 1 - across.square().sum().item() / scale if scale else 1.0


def _unexplained(sums: _Covariances) -> float:
    of_teacher, across, of_student = sums.parts()
    variance = of_teacher.trace().item()
    if not variance:
        return 0.0
    ridge = _RIDGE * of_student.trace() / len(of_student) + torch.finfo(torch.float64).tiny
    weights = torch.linalg.solve(of_student + ridge * torch.eye(len(of_student)).to(of_student), across)
    explained = 2 * (weights * across).sum() - (weights * (of_student @ weights)).sum()
    return 1 - explained.item() / variance


_SUMS = {
    "mse_relative": (_SquaredErrors, _relative_error),
    "mse_raw": (_SquaredErrors, _raw_error),
    "cka": (_Covariances, _misalignment),
    "regress": (_Covariances, _unexplained),
}
SCORES = tuple(_SUMS)


@torch.no_grad()
def layer_scores(batches: Iterable[Sequence[Pair]], score: str = "mse_relative") -> list[float]:
    """Score of each layer from batches of pairs ((B, c, h, w) of the teacher, (B, c', h, w) of the student); high: far apart.

    With D the mean squared difference and E the teacher's mean square, `mse_relative` is D / (D + E), in (0, 1) and free of
    scale, `mse_raw` is D (RAAD, Eq. 4). Both take the order of channels for part of the task, which only the last layer of a
    student learns. `cka` is 1 - linear CKA of the patches (Kornblith et al. 2019) and `regress` the share of the teacher's
    variance that the best affine map of the student's patches leaves (ridge 1e-8 of the mean variance per channel): neither
    knows an order.

    Raises:
        ValueError: another score, or no batch.
    """
    if score not in _SUMS:
        raise ValueError(f"score {score!r} is none of {', '.join(SCORES)}")
    kind, value_of = _SUMS[score]
    sums: list = []
    for pairs in batches:
        sums = sums or [kind() for _ in pairs]
        for of_layer, (teacher, student) in zip(sums, pairs, strict=True):
            for image in range(len(teacher)):  # float64 and centred, a whole batch would take gigabytes
                of_layer.add(teacher[image], student[image])
    if not sums:
        raise ValueError("layers cannot be scored without images")
    return [value_of(of_layer) for of_layer in sums]


@torch.no_grad()
def orthogonality(outputs: Sequence[Tensor], beta: float = 10.0) -> list[float]:
    """OMPQ's theta of each layer, exp(-beta * sum of its linear CKA with all others) (Ma et al., AAAI 2023).

    The outputs are those of one network for one batch, (B, ...) each; CKA is that of centred Gram matrices of images, which
    are all alike for fewer than 3. 1 for a layer that is like no other.
    """
    grams = torch.stack([_centred_gram(output) for output in outputs]).flatten(1)
    grams = F.normalize(grams, dim=1)  # zero for a layer that tells no images apart
    similarity = grams @ grams.T
    others = similarity.sum(dim=1) - similarity.diagonal()
    return [math.exp(-beta * value) for value in others.tolist()]


def _centred_gram(output: Tensor) -> Tensor:
    """(B, ...) -> (B, B) float64: products of the images' features minus their mean image."""
    features = output.flatten(1)
    gram = features.new_zeros(len(features), len(features), dtype=torch.float64)
    for part in features.split(max(1, _CHUNK // len(features)), dim=1):
        centred = part.double() - part.double().mean(dim=0)
        gram += centred @ centred.T
    return gram


def mean_hessian_traces(loss: Callable[[], Tensor], weights: Sequence[Tensor], probes: int = 50, seed: int = 0) -> list[float]:
    """Trace of the loss's Hessian for each layer's weights, divided by their number (Hutchinson's estimate).

    All layers are probed at once with random signs: products across layers average to zero. `loss` gives a scalar that
    depends on every tensor of `weights`.
    """
    gradients = torch.autograd.grad(loss(), weights, create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    traces = [0.0] * len(weights)
    for _ in range(probes):
        signs = [torch.randint(2, weight.shape, generator=generator).mul(2).sub(1).to(weight) for weight in weights]
        products = torch.autograd.grad(gradients, weights, grad_outputs=signs, retain_graph=True)
        for layer, (sign, product) in enumerate(zip(signs, products, strict=True)):
            traces[layer] += (sign * product).double().sum().item() / probes
    return [trace / weight.numel() for trace, weight in zip(traces, weights, strict=True)]


@torch.no_grad()
def perturbations(
    weights: Sequence[Tensor], mean_traces: Sequence[float], quantize: Callable[[Tensor, int], Tensor], choices: Sequence[int]
) -> list[list[float]]:
    """HAWQ-v2's Omega of each layer at each choice of bits: mean Hessian trace x ||Q(W) - W||^2 (Dong et al., NeurIPS 2020).

    `quantize(weights, bits)` gives the weights as they are after quantization. A negative trace, at a saddle or by chance,
    counts as 0: no layer gains from being quantized.
    """
    return [
        [max(trace, 0.0) * (quantize(weight, bits) - weight).double().square().sum().item() for bits in choices]
        for weight, trace in zip(weights, mean_traces, strict=True)
    ]
