"""The records of the wanted categories, checked before any work begins, and which of them one model is trained on."""

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from datasets.catalog import DataSource, choose_items, data_sources, label_of
from datasets.check import shared_images, undecodable
from datasets.few_shot import VARIANTS_PER_IMAGE, choose_shots
from datasets.records import Record, check_mask_sizes
from utils.run_folder import check_category_names
from utils.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CategoryData:
    """Records of one category; bad ones are already left out, images shared by training and test are only listed.

    `held_out`: how many of `train` are not trained on; `validation`: the data set's own held-out images, in their place.
    """

    item: str
    source: DataSource
    train: list[Record]
    test: list[Record]
    bad: list[tuple[Record, str]]
    shared: list[tuple[Path, Path]]
    held_out: int = 0
    validation: list[Record] = field(default_factory=list)

    def chosen_files(self) -> list[str]:
        """Training images, relative to the root of the data set."""
        root = self.source.root
        bases = (root, root.resolve())  # some layouts list resolved paths
        return [
            next((path.relative_to(base) for base in bases if path.is_relative_to(base)), path).as_posix()
            for path in (record.path for record in self.train)
        ]


@dataclass(frozen=True)
class ModelData:
    """What one model is trained on and tested on: one category, or all of them under the name of the setting."""

    name: str
    categories: list[CategoryData]
    one_of_many: bool
    variants: int

    def folder(self, run: Path) -> Path:
        """Where `model.pth` lies."""
        return run / self.name if self.one_of_many else run

    @property
    def items(self) -> list[str]:
        """Names of the categories."""
        return [category.item for category in self.categories]

    @property
    def training_count(self) -> int:
        """Images that are trained on, in few-shot with all their variants."""
        return self.variants * sum(len(category.train) - category.held_out for category in self.categories)


def list_data(settings: Settings) -> list[CategoryData]:
    """Records of all wanted categories, checked as far as that is cheap, so that errors come before any training."""
    options, training = settings.data, settings.phase == "train"
    sources = data_sources(options.dataset, options.paths)
    categories = []
    chosen = choose_items(sources, options.items)
    check_category_names(label_of(sources, source, name) for source, name in chosen)
    for source, name in chosen:
        layout, item = source.layout, label_of(sources, source, name)
        train = layout.train(source.root, name, options.listing) if training else []
        kept_apart = training and options.holdout and layout.validation
        validation = layout.validation(source.root, name, options.listing) if kept_apart else []
        test = layout.test(source.root, name, options.listing)
        bad = undecodable([*train, *validation, *test], options.max_pixels) if options.skip_bad_images else []
        skipped = {record for record, _ in bad}
        train, validation, test = ([record for record in part if record not in skipped] for part in (train, validation, test))
        if options.shot is not None and training:
            train = choose_shots(train, options.shot, settings.training.seed, name)
        check_mask_sizes(test, options.max_pixels)
        held_out = _held_out_count(len(train), options.holdout, name) if train and not validation else 0
        shared = shared_images(train, test)
        categories.append(CategoryData(item, source, train, test, bad, shared, held_out, validation))
    return categories


def _held_out_count(images: int, share: float, item: str) -> int:
    count = round(share * images)
    if share and count < 2:
        more = f"give --holdout {math.ceil(200 / images) / 100:g} or more" if images > 3 else "leave it out"
        raise UserError(
            f"--holdout {share:g} keeps {count} of the {images} training images of {item}, 2 are the least; {more}, "
            "or name other categories with --item"
        )
    return count


def all_items(settings: Settings) -> list[str]:
    """Names of all categories of the data sets, in their order, wanted or not."""
    sources = data_sources(settings.data.dataset, settings.data.paths)
    return [label_of(sources, source, name) for source, name in choose_items(sources, None)]


def models_of(settings: Settings, categories: list[CategoryData]) -> list[ModelData]:
    """The models of this setting: one for all categories, or one for each."""
    variants = 1 if settings.data.shot is None else VARIANTS_PER_IMAGE
    if settings.one_model:
        return [ModelData(settings.config["setting"], categories, one_of_many=False, variants=variants)]
    return [ModelData(category.item, [category], one_of_many=True, variants=variants) for category in categories]


def log_data(category: CategoryData) -> None:
    """Say how many images there are, and what is odd about them."""
    defective = sum(record.label for record in category.test)
    logger.info(
        "%s: %d images to train on, %d good and %d defective test images",
        category.item,
        len(category.train) - category.held_out,
        len(category.test) - defective,
        defective,
    )
    if category.held_out:
        logger.info("%s: %d more training images held out (--holdout)", category.item, category.held_out)
    if category.validation:
        logger.info("%s: %d validation images of the data set held out (--holdout)", category.item, len(category.validation))
    for trained, tested in category.shared:
        logger.warning("%s: the same image is in train and test: %r and %r", category.item, str(trained), str(tested))
    if not category.test:
        logger.warning("%s: no test images; the model is trained, but nothing says how good it is", category.item)
    elif defective in (0, len(category.test)):
        logger.warning("%s: the test images are all of one class; image metrics do not exist (empty cells)", category.item)
    without_masks = sum(not record.has_pixel_truth for record in category.test)
    if without_masks:
        logger.warning("%s: %d defective images have no mask and count for image metrics only", category.item, without_masks)
    if category.bad:
        logger.warning("%s: %d undecodable images skipped, see bad_images.csv", category.item, len(category.bad))
