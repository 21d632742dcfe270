"""What descriptions of packed files say besides the network, for tests that write their own."""

from dataclasses import asdict

from common.normalisation import IMAGENET_MEAN, IMAGENET_STD
from utils.protocol import EvaluationOptions

PROTOCOL = {name: value for name, value in asdict(EvaluationOptions()).items() if name != "scoring"}
DECISION = {"threshold": 0.3, "quantile": 0.99, "margin": 1.0, "images": 8, "source": "a test"}


def preprocessing(input_size: int, crop_size: int) -> dict:
    """Of images that are resized and cropped to these sides."""
    colours = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    return {"input_size": input_size, "crop_size": crop_size, **colours}
