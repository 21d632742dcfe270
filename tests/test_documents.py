"""Documents name tests that exist, and every case has one."""

import ast
import re

from tests.conftest import REPOSITORY

RELIABILITY = REPOSITORY / "docs" / "RELIABILITY.md"


def names_of_tests(name: str) -> set[str]:
    tree = ast.parse((REPOSITORY / "tests" / name).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_case_of_reliability_is_shown_by_tests_that_exist():
    rows = re.findall(r"^\| (\d*)(.*)\|$", RELIABILITY.read_text(), re.MULTILINE)
    cases = [int(number) for number, _ in rows if number]
    assert cases == list(range(1, 48))
    for number, row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named or not number
        assert [name for file, name in named if name not in names_of_tests(file)] == []
