"""Write the tables of ``docs/measured.md`` from the kept results.

Run ``python -m benchmarks.measured`` after a benchmark; a test holds the page against it. Words are
written by hand, and what stands between ``<!-- table NAME -->`` and ``<!-- end of table -->`` is
not. A table says where its figures come from, and of which day and commit they are.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.tables import TABLES

PAGE = Path(__file__).parents[1] / "docs" / "measured.md"
_MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def page(text: str, folder: Path = RESULTS) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: it has a mark for a table that nothing makes.
    """
    return _MARKED.sub(lambda found: f"{found[1]}{table(found[2], folder)}{found[3]}", text)


def table(name: str, folder: Path = RESULTS) -> str:
    """One table with the words that introduce it, and what it sums up to.

    Raises:
        ValueError: nothing makes a table of this name.
    """
    if name not in TABLES:
        raise ValueError(
            f"no table is called {name!r}; benchmarks/tables.py has {', '.join(TABLES)}"
        )
    file, lines = TABLES[name]
    path = folder / f"{file}.json"
    if not path.exists():
        return "\nNot measured yet.\n\n"
    record = json.loads(path.read_text())
    origin = (
        f"[`{file}.json`](../benchmarks/results/{file}.json): {record['date'][:10]}, commit "
        f"{record['commit']}, {record['machine']}."
    )
    return "\n" + "\n".join([origin, "", *lines(record["results"])]).rstrip() + "\n\n"


def main() -> None:
    """Renew the page."""
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
