"""Float networks."""

from common.torchvision_guard import ensure_torchvision

ensure_torchvision()
