"""Codes of quantized weights as bytes: `bits` bits each, one after another, as files hold them."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 ... 2^bits - 1 of any shape, in its order, as ceil(n bits / 8) bytes uint8.

    Bit j (least significant first) of code i is bit i bits + j of the bytes, which are counted from the least significant, too;
    unused bits are 0.
    """
    columns = codes.to(torch.uint8).reshape(-1, 1).cpu().numpy()
    return torch.from_numpy(np.packbits(np.unpackbits(columns, axis=1, count=bits, bitorder="little"), bitorder="little"))


def unpack_codes(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Codes uint8 of that shape from what `pack_codes` gave.

    Raises:
        ValueError: not as many bytes as such codes take.
    """
    count = math.prod(shape)
    size = (count * bits + 7) // 8
    if packed.dtype != torch.uint8 or packed.shape != (size,):
        raise ValueError(
            f"codes of {bits} bits for weights {tuple(shape)} are {packed.dtype} of shape {tuple(packed.shape)}, expected "
            f"torch.uint8 of shape ({size},)"
        )
    digits = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(digits, axis=1, bitorder="little")).reshape(tuple(shape))
