"""Import torchvision beside a CPU build of torch.

The torchvision wheels of the package index are linked against CUDA. Beside a CPU build of torch their operators
do not load, and `import torchvision` (hence `import timm`) fails with "operator torchvision::nms does not exist".
Declaring the two operators it registers fake kernels for is enough: this project calls neither.
"""

import sys

_declared_operators = []


def ensure_torchvision() -> None:
    """Make `import torchvision` work; raises what torchvision raises for any other reason."""
    try:
        import torchvision

        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared_operators.append(library)  # the declarations live as long as this object
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    import torchvision  # noqa: F401
