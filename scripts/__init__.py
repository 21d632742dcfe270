"""Command-line tools around the training scripts."""

from common.startup import prepare_start

prepare_start()
