"""Everything between the entry scripts and the models: arguments, training, evaluation, metrics, files, reports."""

from common.startup import prepare_start
from common.torchvision_guard import ensure_torchvision

prepare_start()
ensure_torchvision()
