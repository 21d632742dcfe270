"""VarAD's block: every token of a map predicted from tokens far before it, along several directions, by a selective scan."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Mlp
from models.selective_scan import selective_scan

_LAYER_NORM_EPS = 1e-6
_START_STD = 0.02
_STEP_RANGE = (1e-3, 0.1)  # of the scan's step sizes before training, log-uniform as in Mamba
_CONVOLUTION = 4  # tokens that the `paper` preset's causal convolution sees
DIRECTIONS = ("row", "column", "reversed_row", "reversed_column")


@dataclass(frozen=True)
class BlockNumbers:
    """A form of the block: states per channel (None: a sixth of the token width), convolution, norm of the scan, MLP."""

    d_state: int | None
    convolution: bool
    scan_norm: bool
    mlp: bool
    residual_of_norm: bool


PRESETS = {
    "released": BlockNumbers(d_state=None, convolution=False, scan_norm=True, mlp=True, residual_of_norm=True),
    "paper": BlockNumbers(d_state=16, convolution=True, scan_norm=False, mlp=False, residual_of_norm=False),
}


def in_order(tokens: Tensor, direction: str) -> Tensor:
    """Tokens (B, N, c) of a square map, row by row -> in the order in which a direction visits them."""
    tokens = tokens if direction.endswith("row") else _transposed(tokens)
    return tokens.flip(1) if direction.startswith("reversed") else tokens


def in_place(tokens: Tensor, direction: str) -> Tensor:
    """Inverse of `in_order`."""
    tokens = tokens.flip(1) if direction.startswith("reversed") else tokens
    return tokens if direction.endswith("row") else _transposed(tokens)


def _transposed(tokens: Tensor) -> Tensor:
    grid = math.isqrt(tokens.shape[1])
    return tokens.unflatten(1, (grid, grid)).transpose(1, 2).flatten(1, 2)


class StateSpaceBlock(nn.Module):
    """Predict each token from the tokens at least `distance` before it in a direction; K directions, averaged.

    The projections are shared by the directions, the scan's own parameters (step, A, B, C, D) are not. Each direction starts
    with 1.5 x `distance` start tokens, so that the first tokens are predicted from something.

    Args:
        dim: token width C.
        grid: tokens per side of the map.
        distance: M; the prediction of token l sees tokens 0..l-M of its direction.
        directions: some of `DIRECTIONS`.
        numbers: form of the block; `d_state` of it may be replaced.
        learn_start: train the start tokens, which are fixed noise otherwise.

    Raises:
        ValueError: `distance` leaves nothing to predict from.
    """

    def __init__(
        self, dim: int, grid: int, distance: int, directions: tuple[str, ...], numbers: BlockNumbers, learn_start: bool = False
    ):
        super().__init__()
        if not 0 < distance < grid * grid:
            raise ValueError(f"distance {distance} in a map of {grid} x {grid} tokens")
        inner, states, rank = 2 * dim, numbers.d_state or math.ceil(dim / 6), math.ceil(dim / 16)
        self.distance, self.directions, self.numbers, self.tokens = distance, directions, numbers, grid * grid
        self.states, self.rank = states, rank
        count, starts = len(directions), int(1.5 * distance)
        start = _START_STD * torch.randn(count, starts, dim)
        if learn_start:
            self.start = nn.Parameter(start)
        else:
            self.register_buffer("start", start)

        self.norm1 = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.convolution = nn.Conv1d(inner, inner, _CONVOLUTION, groups=inner) if numbers.convolution else None
        self.x_proj = nn.Parameter(torch.empty(count, rank + 2 * states, inner))
        self.step_weight = nn.Parameter(torch.empty(count, inner, rank))
        self.step_bias = nn.Parameter(torch.empty(count, inner))
        self.log_decay = nn.Parameter(torch.empty(count, inner, states))
        self.skip = nn.Parameter(torch.ones(count, inner))
        self.scan_norm = nn.LayerNorm(inner, eps=_LAYER_NORM_EPS) if numbers.scan_norm else None
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.norm2 = nn.LayerNorm(dim, eps=_LAYER_NORM_EPS) if numbers.mlp else None
        self.mlp = Mlp(dim) if numbers.mlp else None
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        bound = 1 / math.sqrt(self.x_proj.shape[-1])
        nn.init.uniform_(self.x_proj, -bound, bound)
        nn.init.uniform_(self.step_weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = map(math.log, _STEP_RANGE)
        step = torch.empty_like(self.step_bias).uniform_(low, high).exp()
        self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # its softplus is `step`
        self.log_decay.copy_(torch.arange(1.0, self.states + 1).log().expand_as(self.log_decay))

    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Those of the scan that drawing to zero would change in kind, and the start tokens."""
        return [self.step_bias, self.log_decay, self.skip] + ([self.start] if isinstance(self.start, nn.Parameter) else [])

    @property
    def scan_macs(self) -> int:
        """Multiply-accumulates of the scan for one image: of each state at each step one for its update, one for the output."""
        directions, inner, states = self.log_decay.shape
        steps = self.start.shape[1] + self.tokens - self.distance
        return 2 * directions * steps * inner * states

    def forward(self, tokens: Tensor, backend: str = "auto") -> Tensor:
        """Tokens (B, N, C) -> their predictions (B, N, C), the mean over the directions."""
        normed, start_normed = self.norm1(tokens), self.norm1(self.start)
        projected = self.in_proj(torch.cat([normed.flatten(0, 1), start_normed.flatten(0, 1)]))  # once for all directions
        ordinary, start = projected.split(
            [tokens.shape[0] * tokens.shape[1], len(projected) - tokens.shape[0] * tokens.shape[1]]
        )
        inputs, gate = ordinary.view(*tokens.shape[:2], -1).chunk(2, dim=-1)
        start_inputs, start_gate = start.view(*self.start.shape[:2], -1).chunk(2, dim=-1)

        scanned = self._scan(self._in_order(inputs, start_inputs, self.start.shape[1]), backend)
        scanned = scanned[:, :, self.start.shape[1] - self.distance :]
        if self.scan_norm is not None:
            scanned = self.scan_norm(scanned)
        gated = scanned * F.silu(self._in_order(gate, start_gate, self.distance))
        residual = (normed, start_normed) if self.numbers.residual_of_norm else (tokens, self.start)
        predicted = self._in_order(*residual, self.distance) + self.out_proj(gated)
        if self.mlp is not None:
            normed = self.norm2(predicted)
            predicted = normed + self.mlp(normed)
        placed = [in_place(predicted[:, k], direction) for k, direction in enumerate(self.directions)]
        return torch.stack(placed).mean(dim=0)

    def _in_order(self, tokens: Tensor, start: Tensor, starts: int) -> Tensor:
        """The last `starts` start tokens, then all tokens that something is predicted from, in the order of each direction.

        (B, N, c) and (K, S, c) -> (B, K, starts + N - M, c). With M start tokens, entry l is what token l is predicted at.
        """
        ordered = torch.stack([in_order(tokens, direction)[:, : -self.distance] for direction in self.directions], dim=1)
        return torch.cat([start[:, start.shape[1] - starts :].expand(len(tokens), -1, -1, -1), ordered], dim=2)

    def _scan(self, inputs: Tensor, backend: str) -> Tensor:
        """(B, K, L, 2C) -> (B, K, L, 2C)."""
        if self.convolution is not None:
            sequences = F.pad(inputs.flatten(0, 1).transpose(1, 2), (_CONVOLUTION - 1, 0))  # sees nothing that follows
            inputs = self.convolution(sequences).transpose(1, 2).view_as(inputs)
        inputs = F.silu(inputs)
        low_rank, input_matrix, output_matrix = (inputs @ self.x_proj.transpose(1, 2)).split(
            [self.rank, self.states, self.states], dim=-1
        )
        step = F.softplus(low_rank @ self.step_weight.transpose(1, 2) + self.step_bias.unsqueeze(1))
        if inputs.is_meta:  # only shapes are asked for
            return torch.empty_like(inputs)
        return selective_scan(inputs, step, -self.log_decay.exp(), input_matrix, output_matrix, self.skip, backend)
