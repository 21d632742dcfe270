"""RAAD's second stage: which layers get how many bits, and quantized networks that give what the float ones gave."""

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from models.efficientad import EfficientAD
from models.patch_description import PatchDescriptionNetwork
from quantize.accounting import layer_sizes, size_of
from quantize.allocation import Allocation, AllocationOptions, allocate
from quantize.blocks import STRIDE, Crops, GradientLoss
from quantize.layers import QuantizationOptions, quantize_network
from quantize.quantizers import UniformQuantizer
from quantize.reconstruction import LayerError, ReconstructionOptions, fit
from quantize.scores import layer_outputs_of, layer_scores, mean_hessian_traces, orthogonality, perturbations
from utils.distributed import is_main

logger = logging.getLogger(__name__)

_SCORED_IMAGES = 64
_PROBED_IMAGES = 8  # for HAWQ, whose second derivatives need much memory
_ANY_BITS = 8  # of layers that are about to be loaded
Passes = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class ScoringOptions:
    """What hierarchical quantization scoring looks at (see `quantize.scores`): kind of score, input and tap of the layers."""

    score: str = "mse_relative"
    input: str = "own"
    tap: str = "pre"


@dataclass(frozen=True)
class QuantizationPlan:
    """Everything that the stage depends on besides the detector and its images.

    `calibration_images`: at most so many training images give ranges and crops; `autoencoder_bits`: of the autoencoder's
    layers, None to leave it float, as RAAD does.
    """

    allocation: AllocationOptions
    scoring: ScoringOptions
    layers: QuantizationOptions
    reconstruction: ReconstructionOptions
    calibration_images: int
    autoencoder_bits: int | None


def first_images(batches: Iterable[Tensor], count: int) -> Tensor:
    """The first `count` images of the batches, or all there are, (n, 3, S, S) on the CPU."""
    images: list[Tensor] = []
    for batch in batches:
        images += batch.cpu()
        if len(images) >= count:
            break
    return torch.stack(images[:count])


def quantize_detector(detector: EfficientAD, plan: QuantizationPlan, training: Passes, normal: Passes) -> dict:
    """Quantize a trained detector in place, which is then in evaluation mode, and learn its teacher's statistics anew.

    Returns the record of what was decided.

    Args:
        training: passes over training images, whose first ones calibrate and reconstruct.
        normal: passes over normal images that score the layers, best such as were not trained on.

    Raises:
        UserError, NumericError: as `allocate` and `reconstruct` do.
    """
    detector.eval()  # the autoencoder's dropout would be in the loss that weighs errors
    decision = decide_bits(detector, plan, normal)
    images = first_images(training(), plan.calibration_images)
    teacher = copy.deepcopy(detector.encoder.network)
    quantize_network(teacher, decision.teacher_bits, plan.layers)
    quantize_network(detector.student, decision.student_bits, plan.layers)
    of_output = replace(plan.reconstruction, fisher="none" if plan.reconstruction.fisher == "none" else "output")
    quiet = not is_main()
    errors = {"teacher": fit(teacher, images, plan.layers, of_output, description="quantizing the teacher", quiet=quiet)}
    loss = _imitation_loss(detector, images) if plan.reconstruction.fisher == "task" else None
    options = plan.layers, plan.reconstruction, loss
    errors["student"] = fit(detector.student, images, *options, description="quantizing the student", quiet=quiet)
    detector.quantized_teacher = teacher
    detector.prepare(training)  # the quantized teacher has statistics of its own
    if plan.autoencoder_bits is not None:
        _quantize_autoencoder(detector, plan, images)
    return {"quantization": _record(detector, decision, errors)}


def decide_bits(detector: EfficientAD, plan: QuantizationPlan, normal: Passes) -> Allocation:
    """Bits of every layer of teacher and student by the plan's method."""
    teacher, student, options = detector.teacher, detector.student, plan.allocation
    parameters = [[size.parameters for size in layer_sizes(network)] for network in (teacher, student)]
    scores, omega = [], []
    if options.method in ("hqs", "budget", "inverted"):
        batches = _to(detector.device, first_images(normal(), _SCORED_IMAGES))
        pairs = layer_outputs_of(teacher, student, batches, plan.scoring.input, plan.scoring.tap, _normaliser(detector))
        scores = layer_scores(pairs, plan.scoring.score)
    elif options.method == "ompq":
        images = first_images(normal(), _SCORED_IMAGES)
        scores = [
            sum(both) / 2 for both in zip(*(_orthogonality(network, images) for network in (teacher, student)), strict=True)
        ]
    elif options.method == "hawq":
        omega = _perturbations(detector, plan, first_images(normal(), _PROBED_IMAGES).to(detector.device))
    decision = allocate(options, *parameters, scores, omega)
    of_hqs = allocate(replace(options, method="hqs"), *parameters, scores) if options.method == "inverted" else None
    if of_hqs and of_hqs.student_bits == decision.student_bits:
        logger.warning("this control has the very bits of --allocation hqs; give another --hqs_phi, such as rank, to both")
    logger.info("bits of the student's layers: %s (%s)", " ".join(map(str, decision.student_bits)), options.method)
    return decision


def _to(device: torch.device, images: Tensor, batch_size: int = 4) -> Iterable[Tensor]:
    return (batch.to(device) for batch in images.split(batch_size))


def _normaliser(detector: EfficientAD) -> Callable[[Tensor], Tensor]:
    mean, std = detector.teacher_mean[:, None, None], detector.teacher_std[:, None, None]
    return lambda maps: (maps - mean) / std


@torch.no_grad()
def _orthogonality(network: PatchDescriptionNetwork, images: Tensor) -> list[float]:
    """OMPQ's theta of each layer, whose maps are averaged to 8 x 8: whole ones of 64 images would take 2 GB a layer."""
    if len(images) < 3:  # two are alike to every layer once their mean is taken away
        raise UserError(
            f"--allocation ompq compares what held-out images look like to the layers and needs three, not {len(images)}; "
            "give a larger --holdout"
        )
    device = next(network.parameters()).device
    batches = [
        [F.adaptive_avg_pool2d(output, 8).cpu() for output in network.layer_outputs(batch)] for batch in _to(device, images)
    ]
    return orthogonality([torch.cat(layer) for layer in zip(*batches, strict=True)])


def _perturbations(detector: EfficientAD, plan: QuantizationPlan, images: Tensor) -> list[list[float]]:
    """HAWQ's Omega of each layer, of teacher and student together; the loss is the student's squared error."""
    networks = [copy.deepcopy(network).requires_grad_() for network in (detector.teacher, detector.student)]
    normalise = _normaliser(detector)

    def loss() -> Tensor:
        target, imitation = normalise(networks[0](images)), networks[1](images)
        return F.mse_loss(imitation[:, : target.shape[1]], target)

    weights = [layer.weight for network in networks for layer in network.convolutions]
    traces = mean_hessian_traces(loss, weights, seed=plan.allocation.seed)

    def quantized(weight: Tensor, bits: int) -> Tensor:
        quantizer = UniformQuantizer(bits, len(weight), symmetric=bits >= 8).to(weight.device)
        quantizer.fit(weight, plan.layers.range_init)
        return quantizer(weight)

    omega = perturbations(weights, traces, quantized, plan.allocation.choices)
    layers = len(omega) // 2
    shared = plan.allocation.share == "pair"
    return [
        [own + (other if shared else 0.0) for own, other in zip(omega[layers + layer], omega[layer], strict=True)]
        for layer in range(layers)
    ]


@torch.no_grad()
def _autoencoder_maps(detector: EfficientAD, images: Tensor) -> Tensor:
    """(N, C, s, s) float16 on the CPU: 2.4 MB for an image of 256 x 256."""
    return torch.cat([detector.autoencoder(batch).half().cpu() for batch in _to(detector.device, images)])


def _imitation_loss(detector: EfficientAD, images: Tensor) -> GradientLoss:
    """What the student is trained for, on crops: its mean squared errors on the float teacher and on the autoencoder.

    The mean over all elements, not over the hardest: which those are changes with every rounding.
    """
    rebuilt = _autoencoder_maps(detector, images)

    def loss(outputs: Tensor, float_outputs: Tensor, crops: Crops) -> Tensor:
        as_teacher, as_autoencoder = outputs.chunk(2, dim=1)
        side = outputs.shape[-1]
        corners = zip(crops.images.tolist(), (crops.rows // STRIDE).tolist(), (crops.columns // STRIDE).tolist(), strict=True)
        cut = [rebuilt[image, :, row : row + side, column : column + side] for image, row, column in corners]
        of_autoencoder = torch.stack(cut).to(outputs)
        return F.mse_loss(as_teacher, detector.teacher_maps(crops.pixels)) + F.mse_loss(as_autoencoder, of_autoencoder)

    return loss


def _quantize_autoencoder(detector: EfficientAD, plan: QuantizationPlan, images: Tensor) -> None:
    """All its layers at the same bits, rounded to nearest: its images are whole, so no crops can reconstruct it."""
    options = replace(plan.layers, round="nearest")
    autoencoder = detector.autoencoder
    quantize_network(autoencoder, [plan.autoencoder_bits] * len(autoencoder.convolutions), options)
    fit(autoencoder, images, options)


def restore_structure(detector: EfficientAD, layers: QuantizationOptions, state: dict[str, Tensor]) -> None:
    """Give a fresh detector the quantized networks that a checkpoint's tensors belong to; the tensors bring bits and values."""
    prefixes = {name.split(".")[0] for name in state if ".weight_quantizer." in name}
    if "quantized_teacher" in prefixes:
        detector.quantized_teacher = copy.deepcopy(detector.encoder.network)
    for prefix in prefixes:
        network = getattr(detector, prefix)
        quickly = replace(layers, range_init="minmax")  # the state brings the ranges
        quantize_network(network, [_ANY_BITS] * len(network.convolutions), quickly)


def _record(detector: EfficientAD, decision: Allocation, errors: dict[str, list[LayerError]]) -> dict:
    """Plain values for the run's folder: bits and why, what each layer lost, and what the detector weighs."""
    size = size_of(detector)
    logger.info(
        "effective parameters: %.2f M teacher and student, %.2f M with the autoencoder; %.2f MB packed, %.2f MB as float32",
        size.effective_teacher_student / 1e6,
        size.effective_all / 1e6,
        size.packed_bytes / 1e6,
        size.float32_bytes / 1e6,
    )
    layers = {network: [asdict(error) for error in of_network] for network, of_network in errors.items()}
    return {"allocation": asdict(decision), "layer_errors": layers, "size": asdict(size)}
