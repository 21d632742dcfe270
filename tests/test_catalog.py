"""Names of data sets and categories: what a command works on, and what it refuses."""

import numpy as np
import pytest

from common.errors import UserError
from datasets import published
from datasets.catalog import LAYOUTS, DataSource, choose_items, data_sources, label_of
from tests.miniature import make_mvtec


def folder(root, items=("bottle",)) -> list[DataSource]:
    return [DataSource("Folder", make_mvtec(root, items=items, train=1, good=1, defective=1))]


def chosen(sources, wanted) -> list[str]:
    return [label_of(sources, source, item) for source, item in choose_items(sources, wanted)]


def test_categories_are_discovered_and_chosen_in_order(tmp_path):
    sources = folder(tmp_path, ("zeta", "alpha", "beta"))
    (tmp_path / ".cache" / "train").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    assert chosen(sources, None) == ["alpha", "beta", "zeta"]
    assert chosen(sources, ["zeta", "alpha", "Folder/zeta"]) == ["alpha", "zeta"]
    with pytest.raises(UserError, match="did you mean 'beta'"):
        choose_items(sources, ["betta"])
    with pytest.raises(UserError, match="no category"):
        choose_items([DataSource("Folder", tmp_path / "alpha")], None)


@pytest.mark.parametrize("name", ["Mean", "up\\..\\.."])
def test_categories_that_results_cannot_be_named_after(tmp_path, name):
    with pytest.raises(UserError, match="rename it"):
        choose_items(folder(tmp_path, (name,)), None)


def test_categories_of_several_data_sets(tmp_path):
    sources = [DataSource("MVTec-AD", tmp_path), DataSource("Real-IAD", tmp_path), *folder(tmp_path / "own", ("part",))]
    everything = chosen(sources, None)
    assert len(everything) == 15 + 30 + 1
    assert (everything[0], everything[15], everything[-1]) == ("MVTec-AD/carpet", "Real-IAD/audiojack", "Folder/part")
    assert chosen(sources, ["part", "usb", "Real-IAD/zipper", "MVTec-AD/zipper", "bottle"]) == [
        "MVTec-AD/bottle",
        "MVTec-AD/zipper",
        "Real-IAD/usb",
        "Real-IAD/zipper",
        "Folder/part",
    ]
    with pytest.raises(UserError, match="write MVTec-AD/zipper or Real-IAD/zipper"):
        choose_items(sources, ["zipper"])
    with pytest.raises(UserError, match="did you mean 'usb_adaptor'"):
        choose_items(sources, ["usb_adapter"])
    with pytest.raises(UserError, match="did you mean 'Real-IAD/zipper'"):
        choose_items(sources, ["RealIAD/zipper"])


def test_sources_are_paired_with_their_folders_in_order(tmp_path):
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        root.mkdir()
    sources = data_sources("VisA+MVTec-AD", list(map(str, roots)))
    assert sources == [DataSource("VisA", roots[0]), DataSource("MVTec-AD", roots[1])]
    assert [source.layout for source in sources] == [LAYOUTS["VisA"], LAYOUTS["MVTec-AD"]]


@pytest.mark.parametrize(
    ("dataset", "count", "message"),
    [
        ("Visa", 1, "did you mean 'VisA'"),
        ("MVTec-AD+Real_IAD", 2, "did you mean 'Real-IAD'"),
        ("MVTec-AD+", 1, "'' is no data set"),
        ("VisA+VisA", 2, "VisA twice"),
        ("VisA+MPDD", 1, "needs 2 folders .* found 1"),
        ("VisA", 2, "needs 1 folders .* found 2"),
        ("VisA+ELPV", 0, "needs 2 folders .* found 0"),
        ("VisA", 0, "needs --data_path"),
    ],
)
def test_sources_refused(tmp_path, dataset, count, message):
    with pytest.raises(UserError, match=message):
        data_sources(dataset, [str(tmp_path)] * count or None)


def test_missing_folder_is_named_with_what_it_should_hold(tmp_path):
    with pytest.raises(UserError, match=r"'.*nowhere' is no folder; expected in it: .*split_csv/1cls\.csv"):
        data_sources("MPDD+VisA", [str(tmp_path), str(tmp_path / "nowhere")])


def test_elpv_lies_where_its_package_is(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: type("Spec", (), {"origin": str(tmp_path / "__init__.py")}))
    assert data_sources("ELPV", None) == [DataSource("ELPV", tmp_path / "data")]


@pytest.mark.parametrize(
    ("dataset", "categories"), [("MVTec-AD", 15), ("VisA", 12), ("MVTec-LOCO", 5), ("BTAD", 3), ("MPDD", 6)]
)
def test_published_counts_add_up(dataset, categories):
    layout = LAYOUTS[dataset]
    assert list(layout.published_counts) == list(layout.published_items)
    assert len(layout.published_items) == categories
    assert tuple(np.sum(list(layout.published_counts.values()), axis=0)) == layout.published_total


def test_published_totals():
    totals = {
        "MVTec-AD": (3629, 467, 1258),
        "VisA": (8659, 962, 1200),
        "Real-IAD": (36465, 63256, 51329),
        "BTAD": (1799, 451, 290),
        "DTD-Synthetic": (1200, 357, 947),
        "MPDD": (888, 176, 282),
    }
    assert {name: LAYOUTS[name].published_total for name in totals} == totals
    loco = LAYOUTS["MVTec-LOCO"]
    assert list(loco.published_validation) == list(loco.published_items)
    assert sum(loco.published_total) + sum(loco.published_validation.values()) == 3644
    assert len(set(published.REAL_IAD)) == len(published.REAL_IAD) == 30
    assert len(set(published.DTD_SYNTHETIC)) == 12
