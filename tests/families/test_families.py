"""Every family of the table beside PEFT, and docs/models.md beside what is seen."""

from pathlib import Path

import pytest
from families import document
from families.checks import check
from families.table import FAMILIES

ROWS = document.FILE.read_text().splitlines()


def names() -> list:
    """A few in the default run; the others are as alike as they look, and slow together."""
    slow = pytest.mark.slow
    return [pytest.param(name, marks=() if family.default else slow) for name, family in FAMILIES.items()]


@pytest.mark.parametrize("name", names())
def test_a_family_is_as_peft_has_it_and_as_the_document_says(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    if not family.is_installed:
        pytest.skip(f"needs {family.package}")
    row = document.row(name, family, check(family, tmp_path))
    assert row in ROWS, f"docs/models.md does not say it: run `python tests/families/document.py`\n{row}"


def test_the_document_has_these_families_and_no_others() -> None:
    assert [row.split("`")[1] for row in ROWS if row.startswith("| `")] == list(FAMILIES)


def test_an_own_error_is_seen(tmp_path: Path) -> None:
    """The checks can fail: a family that is described wrongly is not passed."""
    from dataclasses import replace

    wrong = replace(FAMILIES["bert"], out="key")
    with pytest.raises(AssertionError, match="the sites are not those that the table names"):
        check(wrong, tmp_path / "sites")
    with pytest.raises(AssertionError, match="not refused any more"):
        check(replace(FAMILIES["bert"], mixed="anything"), tmp_path / "rows")
