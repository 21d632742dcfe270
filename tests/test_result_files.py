"""results.csv with columns that only some data sets have, and with several data sets."""

import re

import pytest

from common.errors import UserError
from utils.metrics import METRIC_NAMES
from utils.result_files import mean_rows, read_results, write_results

SEVEN = "item,I-AUROC,I-AP,I-F1,P-AUROC,P-AP,P-F1,AUPRO"


def row(value: float, **further: float | None) -> dict[str, float | None]:
    return {**dict.fromkeys(METRIC_NAMES, value), **{name.replace("_", "-"): number for name, number in further.items()}}


def test_further_columns_follow_the_seven_and_are_empty_where_a_row_lacks_them(tmp_path):
    path = tmp_path / "results.csv"
    write_results(path, {"LOCO/pushpins": row(0.5, AU_sPRO=0.25, I_AUROC_mean=None), "VisA/candle": row(0.75)})
    lines = path.read_text().splitlines()
    assert lines[0] == f"{SEVEN},AU-sPRO,I-AUROC-mean"
    assert lines[1] == "LOCO/pushpins" + ",0.5000" * 7 + ",0.2500,"
    assert lines[2] == "VisA/candle" + ",0.7500" * 7 + ",,"
    assert lines[3] == "Mean LOCO" + ",0.5000" * 7 + ",0.2500,"
    assert lines[4] == "Mean VisA" + ",0.7500" * 7 + ",,"
    assert lines[5] == "Mean" + ",0.6250" * 7 + ",0.2500,"
    assert len(lines) == 6
    rows = read_results(path)
    assert list(rows) == ["LOCO/pushpins", "VisA/candle"]
    assert rows["VisA/candle"] == row(0.75, AU_sPRO=None, I_AUROC_mean=None)
    before = path.read_bytes()
    write_results(path, rows)
    assert path.read_bytes() == before


def test_the_mean_of_all_is_over_categories_not_data_sets():
    rows = {"A/one": row(1.0), "A/two": row(0.5), "A/three": row(0.0), "B/one": row(0.0)}
    means = mean_rows(rows)
    assert list(means) == ["Mean A", "Mean B", "Mean"]
    assert [mean["AUPRO"] for mean in means.values()] == [0.5, 0.0, 0.375]


def test_a_table_of_seven_columns_is_rewritten_unchanged(tmp_path):
    path = tmp_path / "results.csv"
    text = f"{SEVEN}\nbottle,0.9000,,0.1000,1.0000,0.5000,0.2500,0.7500\nMean,0.9000,,0.1000,1.0000,0.5000,0.2500,0.7500\n"
    path.write_text(text)
    write_results(path, read_results(path))
    assert path.read_text() == text


def test_only_means_of_data_sets_in_the_table_are_passed_over(tmp_path):
    path = tmp_path / "results.csv"
    rows = {"Mean machine": row(0.5), "A/Mean A": row(0.25), "Mean B": row(0.75)}
    write_results(path, rows)
    assert read_results(path) == rows


@pytest.mark.parametrize("header", ["item,AUPRO", f"name{SEVEN[4:]}", f"{SEVEN},AU-sPRO,AU-sPRO", SEVEN.replace("I-AP", "AP")])
def test_other_columns_are_damage(tmp_path, header):
    path = tmp_path / "results.csv"
    path.write_text(f"{header}\n")
    with pytest.raises(UserError, match=r"results\.csv.*unknown columns"):
        read_results(path)


def test_a_table_cut_short_is_never_taken_for_numbers(tmp_path):
    path = tmp_path / "results.csv"
    write_results(path, {item: dict.fromkeys(METRIC_NAMES, 0.9419) for item in ("bottle", "cable")})
    complete = path.read_text()
    for length in range(len(complete)):
        if complete[:length].endswith("\n"):
            continue  # a whole table of fewer categories
        path.write_text(complete[:length])
        with pytest.raises(UserError, match=r"results damaged: .*results\.csv.* (cut short|empty)"):
            read_results(path)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("1.9826", "has '1.9826' where"),
        ("0.94", "has '0.94' where"),
        ("nan", "has 'nan' where"),
        ("0.9419,0.9419", "has 9 of 8 cells"),
    ],
)
def test_numbers_that_no_run_wrote_are_refused(tmp_path, found, reason):
    path = tmp_path / "results.csv"
    write_results(path, {"bottle": dict.fromkeys(METRIC_NAMES, 0.9419)})
    path.write_text(path.read_text().replace("bottle,0.9419", f"bottle,{found}"))
    with pytest.raises(UserError, match=r"line 2 of .*" + re.escape(reason)):
        read_results(path)
