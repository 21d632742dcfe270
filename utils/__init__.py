"""Everything between the entry scripts and the models: arguments, training, evaluation, metrics, files, reports."""

from common.torchvision_guard import ensure_torchvision

ensure_torchvision()
