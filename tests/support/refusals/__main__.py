"""Write the tables into the document."""

from tests.support.refusals.table import DOCUMENT, with_tables

DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
