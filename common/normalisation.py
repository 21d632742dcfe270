"""What images are normalised with before any network sees them: mean and deviation of ImageNet's colours, in 0 to 1."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
