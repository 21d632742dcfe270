"""The records of the wanted categories, checked before any work begins."""

import logging
from dataclasses import dataclass
from pathlib import Path

from datasets.catalog import LAYOUTS, choose_items, data_root
from datasets.check import shared_images, undecodable
from datasets.records import Record, check_mask_sizes
from utils.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CategoryData:
    """Records of one category; bad ones are already left out, images shared by training and test are only listed."""

    item: str
    train: list[Record]
    test: list[Record]
    bad: list[tuple[Record, str]]
    shared: list[tuple[Path, Path]]


def list_data(settings: Settings) -> list[CategoryData]:
    """Records of all wanted categories, checked as far as that is cheap, so that errors come before any training."""
    options = settings.data
    root, layout = data_root(options.dataset, options.path), LAYOUTS[options.dataset]
    categories = []
    for item in choose_items(options.dataset, root, options.items):
        train = layout.train(root, item) if settings.phase == "train" else []
        test = layout.test(root, item, options.allow_missing_masks)
        bad = undecodable([*train, *test], options.max_pixels) if options.skip_bad_images else []
        skipped = {record for record, _ in bad}
        train, test = ([record for record in part if record not in skipped] for part in (train, test))
        check_mask_sizes(test, options.max_pixels)
        categories.append(CategoryData(item, train, test, bad, shared_images(train, test)))
    return categories


def log_data(category: CategoryData) -> None:
    """Say how many images there are, and what is odd about them."""
    defective = sum(record.label for record in category.test)
    logger.info(
        "%s: %d images to train on, %d good and %d defective test images",
        category.item,
        len(category.train),
        len(category.test) - defective,
        defective,
    )
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
