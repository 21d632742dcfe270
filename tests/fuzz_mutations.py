"""Which mutations each form of file gets."""

from dataclasses import dataclass

from tests.fuzz_archives import (
    array_header,
    checkpoint_forged,
    header_length,
    header_tree,
    packed_forged,
    pickle_attack,
    png_chunk,
    tensor_bytes,
    torch_tree,
    zip_entries,
    zip_entry,
)
from tests.fuzz_bytes import BYTES, Change
from tests.fuzz_texts import csv_cells, csv_text, json_line, json_text, json_tree, line_words, yaml_text, yaml_tree


@dataclass(frozen=True)
class Mutation:
    """A way to change a file; a `forged` one has the right hash, so that it is valid if it makes sense."""

    name: str
    change: Change
    forged: bool = False


def _mutations(*changes: Change, forged: Change | None = None, repeat: int = 3) -> list[Mutation]:
    """Those of bytes, and the others several times as often as each of these."""
    own = [Mutation(change.__name__, change) for change in changes] * repeat
    own += [Mutation(forged.__name__, forged, forged=True)] * (2 * repeat) if forged else []
    return [*(Mutation(change.__name__, change) for change in BYTES), *own]


MUTATIONS = {
    "bytes": _mutations(),
    "json": _mutations(json_tree, json_tree, json_text, repeat=4),
    "json lines": _mutations(json_line, repeat=10),
    "yaml": _mutations(yaml_tree, yaml_tree, yaml_text, repeat=4),
    "csv": _mutations(csv_cells, csv_cells, csv_text, repeat=4),
    "lines": _mutations(line_words, repeat=8),
    "torch": _mutations(zip_entry, zip_entries, pickle_attack, torch_tree, torch_tree),
    "checkpoint": _mutations(zip_entry, zip_entries, pickle_attack, torch_tree, forged=checkpoint_forged, repeat=2),
    "safetensors": _mutations(header_tree, header_length, tensor_bytes),
    "packed": _mutations(header_tree, header_length, tensor_bytes, forged=packed_forged),
    "array": _mutations(array_header, repeat=6),
    "png": _mutations(png_chunk, repeat=8),
}
