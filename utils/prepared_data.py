"""Images ready for a detector: few-shot variants, resized images and features cached as the settings say."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from datasets.few_shot import FewShotDataset
from datasets.records import ImageDataset, Record
from datasets.transforms import interpolation_entry
from models.detector import Detector
from utils.cache_plan import plan_cache
from utils.categories import CategoryData, ModelData
from utils.devices import autocast
from utils.feature_cache import FeatureDataset, bytes_per_image, cache_features, cached_count
from utils.image_cache import cache_images
from utils.settings import Settings

Places = dict[str, str]  # part ("train" or "test") -> where its features are kept: off, ram or disk


@dataclass(frozen=True)
class PreparedData:
    """What one model learns from and is measured on.

    Attributes:
        train: the images that are trained on, in few-shot all their variants.
        normal: category -> its held-out images; if none are held out, all its training images as they are.
        test: category -> test images, of categories that are not finished.
        features: precision of cached features, or "not cached".
    """

    train: Dataset
    normal: dict[str, Dataset]
    test: dict[str, Dataset]
    features: str


def plan_features(settings: Settings, models: list[ModelData], detector: Detector) -> Places:
    """Where the features of all images of the command go, announced with their size.

    Raises:
        ResourceError: the place that the settings ask for does not suffice.
    """
    categories = [category for model in models for category in model.categories]
    parts = {"test": [_images(settings, category.test) for category in categories if category.test]}
    if settings.phase == "train":
        validation = [_images(settings, category.validation) for category in categories if category.validation]
        parts = {"train": [_training_images(settings, category) for category in categories] + validation, **parts}
    if settings.cache_features == "off" or not detector.caches_features:
        return dict.fromkeys(parts, "off")
    folder, identity = settings.save_dir / "feature_cache", _identity(settings, detector)
    return plan_cache(
        {name: sum(map(len, part)) for name, part in parts.items()},
        bytes_per_image(settings.data.crop_size, _encoder(settings, detector)),
        settings.cache_features,
        folder,
        found={name: sum(cached_count(images, identity, folder) for images in part) for name, part in parts.items()},
        at_once={"test": max(sum(len(category.test) for category in model.categories) for model in models)},
    )


def prepare(settings: Settings, model: ModelData, detector: Detector, places: Places, finished: set[str]) -> PreparedData:
    """Training and test images of a model; what can be cached is encoded here, so that broken files show up early."""

    def cached(images: Dataset, name: str) -> Dataset:
        return _cached(settings, images, detector, places["train"], name)

    parts = {
        category.item: cached(_training_images(settings, category), f"{category.item} train") for category in model.categories
    }
    split = {
        category.item: _split_held_out(parts[category.item], category.held_out, settings.training.seed)
        for category in model.categories
    }
    validation = {
        category.item: cached(_images(settings, category.validation), f"{category.item} validation")
        for category in model.categories
        if category.validation
    }
    test = {
        category.item: test_images(settings, category, detector, places)
        for category in model.categories
        if category.item not in finished
    }
    return PreparedData(
        train=ConcatDataset([trained for trained, _ in split.values()]),
        normal={item: Subset(kept, range(0, len(kept), model.variants)) for item, (_, kept) in split.items()} | validation,
        test=test,
        features="float16" if all(isinstance(part, FeatureDataset) for part in parts.values()) else "not cached",
    )


def _split_held_out(images: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Images to train on, and a random `count` of them that is kept for what is learned afterwards; all for both if it is 0."""
    if not count:
        return images, images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(images, sorted(order[count:])), Subset(images, sorted(order[:count]))


def test_images(settings: Settings, category: CategoryData, detector: Detector, places: Places) -> Dataset:
    """Test images of a category."""
    return _cached(settings, _images(settings, category.test), detector, places["test"], f"{category.item} test")


def _images(settings: Settings, records: list[Record]) -> ImageDataset:
    data = settings.data
    return ImageDataset(records, data.input_size, data.crop_size, data.max_pixels, interpolation=data.interpolation)


def _training_images(settings: Settings, category: CategoryData) -> Dataset:
    images = _images(settings, category.train)
    return images if settings.data.shot is None else FewShotDataset(images)


def _cached(settings: Settings, images: Dataset, detector: Detector, place: str, name: str) -> Dataset:
    """The images with their features, or else perhaps their resized pixels, cached."""
    training = settings.training
    if place == "off" and isinstance(images, ImageDataset):
        return cache_images(images, settings.data.cache_images, settings.save_dir / "image_cache", training.num_workers, name)
    return cache_features(
        images,
        _encoder(settings, detector),
        _identity(settings, detector),
        place,
        settings.save_dir / "feature_cache",
        training.batch_size,
        training.num_workers,
        name,
    )


def _identity(settings: Settings, detector: Detector) -> dict:
    return {
        "encoder_sha256": detector.encoder.weights_sha256,
        "taps": detector.encoder.taps,
        **detector.feature_identity(),
        "pos_embed": settings.model.position_embedding,
        "precision": settings.training.precision,
        **interpolation_entry(settings.data.interpolation),
    }


def _encoder(settings: Settings, detector: Detector) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def encode(batch: Tensor) -> Tensor:
        with autocast(detector.device, settings.training.precision):
            return detector.encode(batch.to(detector.device)).cpu()

    return encode
