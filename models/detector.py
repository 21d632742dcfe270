"""What every detector offers: images in, anomaly map out. Training, evaluation and reports are written against this."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import Parameter


class Detector(nn.Module, ABC):
    """A network with a frozen part (`encoder`) and a trained part (everything else).

    `inputs` is an image batch (B, 3, H, W) or what `encode` returned for it.
    """

    encoder: nn.Module
    trains_encoder = False  # with true, `encode` changes during the training
    runs_encoder = True  # with false, something else has taken its place
    caches_features = True  # with false, what the frozen part makes of images is not kept

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """What the frozen part makes of images (B, 3, H, W); the feature cache stores it."""

    @abstractmethod
    def training_loss(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar to minimise, and its detached parts by name for the log."""

    @abstractmethod
    def anomaly_map(self, inputs: Tensor) -> Tensor:
        """(B, H, W) at the input's resolution, higher is more anomalous, not smoothed, float32."""

    def feature_identity(self) -> dict[str, object]:
        """What determines `encode` besides images, encoder and precision; cached features of another identity are not used."""
        return {}

    def prepare(self, batches: Callable[[], Iterable[Tensor]]) -> None:
        """Learn from the training images before the training; `batches` gives a pass over them at every call."""

    def begin_iteration(self, iteration: int, total_iterations: int) -> None:
        """Told before each training step, counted from 0, for what follows a schedule; does nothing by default."""

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Learn from batches of inputs of normal images, once the training is over; does nothing by default."""

    def features_of(self, inputs: Tensor) -> Tensor:
        """Encode images, pass features through."""
        is_image = inputs.ndim == 4 and inputs.shape[1] == 3
        return self.encode(inputs) if is_image else inputs

    def trainable_parameters(self) -> Iterator[Parameter]:
        """Parameters the optimiser changes."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def parameters_without_decay(self) -> list[Parameter]:
        """Those of them that the optimiser does not draw to zero; none by default (binary layers' scales are known anyway)."""
        return []

    def trained_state(self) -> dict[str, Tensor]:
        """State dict without the frozen encoder: what a checkpoint stores."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Load what `trained_state` gave; raises RuntimeError with all missing and surplus names."""
        frozen = {f"encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        self.load_state_dict({**frozen, **state})

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
