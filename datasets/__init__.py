"""Data sets: one file per folder layout, all giving the same records. Data folders below this one are ignored by git."""

from common.torchvision_guard import ensure_torchvision

ensure_torchvision()
