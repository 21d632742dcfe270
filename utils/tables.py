"""Aligned text tables for terminals and logs."""

from binarize.cost import Cost


def format_cost(table: dict[str, Cost]) -> str:
    """The table as text; the last two columns compare with the same model in float32."""
    header = ("part", "parameters", "binary", "MB", "GMAC", "binary GMAC", "GMAC at 1/64", "size ratio", "MAC ratio")
    rows = [header]
    for part, cost in table.items():
        rows.append(
            (
                part,
                f"{cost.parameters / 1e6:.2f} M",
                f"{cost.binary_parameters / 1e6:.2f} M",
                f"{cost.bytes / 1e6:.2f}",
                f"{cost.macs / 1e9:.2f}",
                f"{cost.binary_macs / 1e9:.2f}",
                f"{cost.equivalent_macs / 1e9:.2f}",
                f"{cost.size_ratio:.2f}x",
                f"{cost.mac_ratio:.2f}x" if cost.mac_ratio else "-",
            )
        )
    return format_rows(rows)


def format_rows(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as aligned text, the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not index else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
