"""Image and mask transforms of INP-Former and Dinomaly: resize, centre crop, normalise; no augmentation."""

from torchvision import transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def image_transform(input_size: int, crop_size: int) -> transforms.Compose:
    """PIL RGB -> (3, crop, crop): exact resize whatever the aspect (bilinear), centre crop, ImageNet mean and std."""
    return transforms.Compose(
        [
            transforms.Resize((input_size, input_size)),
            transforms.ToTensor(),
            transforms.CenterCrop(crop_size),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def mask_transform(input_size: int, crop_size: int) -> transforms.Compose:
    """PIL grey mask -> (1, crop, crop) in 0..1; bilinear like the image, hence grey at the edges."""
    return transforms.Compose(
        [transforms.Resize((input_size, input_size)), transforms.CenterCrop(crop_size), transforms.ToTensor()]
    )
