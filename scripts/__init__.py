"""Command-line tools around the training scripts."""
