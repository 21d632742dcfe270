"""The tables of a comparison: results, cost and categories of every section, and where each number comes from."""

from collections.abc import Sequence

from utils.comparison import Average, Comparison, Group, Section
from utils.comparison_notes import FEWER_MARK, pixel_error_notes, published_notes, result_notes
from utils.comparison_quantization import quantization_notes
from utils.hosts import HOSTS
from utils.published import MEAN, Claim, Published, PublishedRow
from utils.report import SCOPES
from utils.run_results import Run
from utils.tables import Table

_ABSENT = "n/a"


def percent(value: Average | None, sign: bool = False) -> str:
    """A fraction in percent with two decimals, with its standard deviation where there is one."""
    if value is None:
        return _ABSENT
    text = f"{100 * value.mean:+.2f}" if sign else f"{100 * value.mean:.2f}"
    return text if value.deviation is None else f"{text} ± {100 * value.deviation:.2f}"


def categories_cell(group: Group) -> str:
    """`15 of 15`, or with a mark if some are missing."""
    done, expected = len(group.items), len(group.parts[0].expected)
    return f"{done} of {expected}" + (FEWER_MARK if done < expected else "")


def seeds_cell(group: Group) -> str:
    """The seeds, and how many if there are several."""
    seeds = " ".join(str(part.run.config["seed"]) for part in group.parts)
    return f"n = {len(group.parts)} ({seeds})" if len(group.parts) > 1 else seeds


def overview(section: Section) -> Table:
    """Our means alone, narrow enough for a terminal."""
    rows = [("run", "stage", "items", *section.metrics)]
    for label, group in section.labelled_groups:
        name = label if len(group.parts) == 1 else f"{label} (n={len(group.parts)})"
        counts = f"{len(group.items)}/{len(group.parts[0].expected)}"
        means = (percent(group.average(metric, group.items)) for metric in section.metrics)
        rows.append((name, str(group.stage), counts, *means))
    return Table(f"{section.setting}, {section.dataset}", rows, tuple(pixel_error_notes(section)))


def result_table(section: Section, published: Published) -> Table:
    """Published means, then ours by stage with the difference to float in brackets."""
    rows = [("method or run", "kind", "stage", "seed", "categories", *section.metrics, "compared with float over", "source")]
    others = [row for row in section.published_rows(published) if row.item == MEAN]
    for row in others:
        rows.append((row.method, row.kind, "", "", "all", *_published_cells(row, section.metrics), "", row.source))
    for label, group in section.labelled_groups:
        cells = _our_cells(group, section.metrics, group.items, group.items_with_float)
        first = (label, "ours", str(group.stage), seeds_cell(group), categories_cell(group))
        rows.append((*first, *cells, _float_cell(group), _source_cell(group)))
    return Table("Results", rows, (*result_notes(section, others), *claim_lines(section, published.claims)))


def cost_table(section: Section) -> Table:
    """Counted bytes and MACs, decoder side and whole model, and milliseconds where they were measured."""
    header = [f"{scope}: {what}" for scope in SCOPES for what in ("MB", "size ratio", "GMAC", "MAC ratio")]
    rows = [("run", *header, "ms", "engine")]
    machines = set()
    for label, group in section.labelled_groups:
        run, cells = group.parts[0].run, []
        for scope in SCOPES:
            cost = run.cost[scope] if run.cost else None
            cells += _cost_cells(cost) if cost else ["-"] * 4
        timing = run.timing or {}
        rows.append((label, *cells, f"{timing['milliseconds']:.1f}" if timing else "-", timing.get("engine", "-")))
        machines |= {f"{'; '.join(timing['machine'])}; {timing['date']}"} if timing else set()
    notes = [
        "Counted, not measured: a binary MAC at 1/64 of a float MAC, a binary weight as one bit; ratios to the float model."
    ]
    notes += [f"Milliseconds from a decoded photograph to its map, one image: {machine}." for machine in sorted(machines)]
    if len(machines) > 1:
        notes.append("Milliseconds come from several measurements and are not comparable; measure all runs in one call.")
    return Table("Cost", rows, (*notes, *quantization_notes(section)))


def category_table(section: Section, published: Published) -> Table:
    """Every category: published rows where there are some, then ours by stage with the difference to float."""
    rows = [("category", "method or run", "kind", "stage", *section.metrics)]
    others = section.published_rows(published)
    for item in section.items:
        for row in others:
            if row.item == item:
                rows.append((item, row.method, row.kind, "", *_published_cells(row, section.metrics)))
        for label, group in section.labelled_groups:
            if item in group.items:
                compared = [item] if item in group.items_with_float else []
                rows.append((item, label, "ours", str(group.stage), *_our_cells(group, section.metrics, [item], compared)))
    shown = [row for row in others if row.item in section.items]
    return Table("Categories", rows, tuple(published_notes(shown)))


def provenance_table(runs: Sequence[Run]) -> Table:
    """Where our numbers come from."""
    rows = [("run", "folder", "commit", "date", "device", "network", "encoder", "weights", "input/crop", "seed", "training")]
    for run in runs:
        config = run.config
        length = f"{config['total_iters']} iterations" if config.get("total_iters") else f"{config['total_epochs']} epochs"
        for folder, environment in zip(run.folders, run.environments, strict=True):
            rows.append(
                (
                    run.name,
                    str(folder),
                    str(environment.get("commit") or "unknown"),
                    str(environment.get("date", "not stored")),
                    str(environment.get("device", "unknown")),
                    run.network,
                    config["encoder"],
                    str(environment.get("encoder_source", "unknown")),
                    f"{config['input_size']}/{config['crop_size']}",
                    str(config["seed"]),
                    f"{length}, batch {_batch_cell(run)}",
                )
            )
    return Table("Our runs", rows)


def protocol_lines(comparison: Comparison) -> list[str]:
    """How our numbers were measured: one line, or one for each protocol if they differ."""
    return sorted({run.protocol for run in comparison.runs if run.rows})


def claim_lines(section: Section, claims: Sequence[Claim]) -> list[str]:
    """Each published claim beside our own ratios and difference."""
    lines = []
    for claim in claims:
        ours = [
            f"{label} (stage {group.stage}): {_ratios(group.parts[0].run)}, {_auroc_difference(group)}"
            for label, group in section.labelled_groups
            if group.stage > 0 and HOSTS[group.host].binarizes
        ]
        if ours:
            lines.append(
                f"{claim.method} claims up to {claim.size_ratio:g}x size, up to {claim.flops_ratio:g}x FLOPs and at most "
                f"{claim.auroc_loss:g} points of I-AUROC lost ({claim.source}). Ours: {'. '.join(ours)}."
            )
    return lines


def _published_cells(row: PublishedRow, metrics: Sequence[str]) -> list[str]:
    return [row.metrics.get(metric) or "-" for metric in metrics]


def _our_cells(group: Group, metrics: Sequence[str], items: Sequence[str], compared: Sequence[str]) -> list[str]:
    cells = []
    for metric in metrics:
        difference = group.difference(metric, compared)
        brackets = f" ({percent(difference, sign=True)})" if difference else ""
        cells.append(percent(group.average(metric, items)) + brackets)
    return cells


def _cost_cells(cost) -> list[str]:
    return [
        f"{cost.bytes / 1e6:.1f}",
        f"{cost.size_ratio:.2f}x",
        f"{cost.equivalent_macs / 1e9:.2f}",
        f"{cost.mac_ratio:.2f}x",
    ]


def _batch_cell(run: Run) -> str:
    """Images of a step: those of all processes, and how many processes with how many each."""
    each = run.config["batch_size"]
    return str(each) if run.processes == 1 else f"{each * run.processes} ({run.processes} x {each})"


def _source_cell(group: Group) -> str:
    """The commits of all folders that the row comes from."""
    full = [str(environment.get("commit") or "unknown") for part in group.parts for environment in part.run.environments]
    short = dict.fromkeys(f"{commit[:10]}{'+changes' if commit.endswith('+changes') else ''}" for commit in full)
    return f"commit{'s' if len(short) > 1 else ''} {', '.join(short)}"


def _float_cell(group: Group) -> str:
    if group.stage == 0:
        return "-"
    if not group.pairs:
        return "no float run"
    seeds = f", {len(group.pairs)} of {len(group.parts)} seeds" if len(group.pairs) < len(group.parts) else ""
    return f"{len(group.items_with_float)} categories{seeds} ({group.float_name})"


def _ratios(run: Run) -> str:
    if not run.cost:
        return "cost not counted"
    return ", ".join(
        f"{scope} {run.cost[scope].size_ratio:.2f}x size and {run.cost[scope].mac_ratio:.2f}x MACs" for scope in SCOPES
    )


def _auroc_difference(group: Group) -> str:
    difference = group.difference("I-AUROC", group.items_with_float)
    if difference is None:
        return "no float run to compare I-AUROC with"
    expected = len(group.parts[0].expected)
    return f"I-AUROC {percent(difference, sign=True)} against float over {len(group.items_with_float)} of {expected} categories"
