"""The doctor's report."""

from scripts.diagnosis.check import BROKEN, Check, Result
from scripts.diagnosis.report import as_markdown
from tests.scripts.diagnosis.helpers import HINT, all_is_well


def test_markdown_is_a_table_whatever_a_check_says():
    rows = [(Check("group", "name", all_is_well, HINT), Result(BROKEN, "a | b", "mend it"))]
    markdown = as_markdown("today", {"Processor": "one"}, rows)
    assert (
        "| **broken** | name (cpu) | a \\| b | 0.0 |" in markdown
        and "- broken: name (cpu). Mend it." in markdown
    )
