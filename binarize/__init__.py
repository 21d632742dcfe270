"""1-bit networks: sign, layers, attention, the stages that lead there, what they cost, and how they run packed."""

from common.torchvision_guard import ensure_torchvision

ensure_torchvision()
