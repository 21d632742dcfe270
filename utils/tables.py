"""One table for every place it is shown in: aligned text for terminals and logs, Markdown, HTML."""

import html
from dataclasses import dataclass

from binarize.cost import Cost

_MARKDOWN_ESCAPES = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;", ">": "&gt;", "*": "\\*", "`": "\\`", "\n": " "})


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first is the header; notes are sentences below."""

    title: str
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """For terminals."""
        return "\n".join([self.title, format_rows(self.rows), *self.notes])

    def markdown(self, level: int) -> str:
        """With a heading of that level."""
        header, *rows = self.rows
        lines = [markdown_row(header), f"|---|{'---:|' * (len(header) - 1)}", *map(markdown_row, rows)]
        notes = "".join(f"\n{escape_markdown(note)}\n" for note in self.notes)
        return f"{'#' * level} {escape_markdown(self.title)}\n\n" + "\n".join(lines) + f"\n{notes}"

    def html(self, level: int) -> str:
        """With a heading of that level."""
        notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in self.notes)
        return f"<h{level}>{html.escape(self.title)}</h{level}>{html_rows(self.rows)}{notes}"


def html_rows(rows: list[tuple[str, ...]]) -> str:
    """An HTML table; the first row is the header."""

    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"


def markdown_row(cells: tuple[str, ...]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(map(escape_markdown, cells))} |"


def escape_markdown(text: str) -> str:
    """Text in which nothing is markup and nothing ends a cell."""
    return text.translate(_MARKDOWN_ESCAPES)


def format_cost(table: dict[str, Cost]) -> str:
    """The table as text; ratios compare with the same model in float32. Without 1-bit parts, their columns are left out."""
    if any(cost.saved_bits for cost in table.values()):
        rows = [("part", "parameters", "MB", "GMAC", "size ratio")]
        for part, cost in table.items():
            numbers = f"{cost.bytes / 1e6:.2f}", f"{cost.macs / 1e9:.2f}", f"{cost.size_ratio:.2f}x"
            rows.append((part, f"{cost.parameters / 1e6:.2f} M", *numbers))
        return format_rows(rows)
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
