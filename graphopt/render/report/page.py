"""A report as one file that a browser shows, without any network."""

from __future__ import annotations

import json
from dataclasses import asdict
from html import escape
from importlib import resources

from graphopt.render.report.document import Document


def page(found: Document) -> str:
    """The report as HTML, with its data, script and style in it."""
    figures = "".join(
        f"<div><dt>{escape(topic)}</dt><dd>{escape(words)}</dd></div>"
        for topic, words in found.figures
    )
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    passes = f"passes <code>{escape(found.passes or 'none')}</code>"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(found.model)}: graphopt report</title>
<style>
{_part("page.css")}</style>
</head>
<body>
<header>
<h1>{escape(found.model)}</h1>
<p class="faint">{passes}, {escape(found.level)} graph, {escape(versions)}</p>
<dl class="tiles">{figures}</dl>
</header>
<nav aria-label="sections"></nav>
<main>
<noscript><p>The rest of this report is drawn by a script, which is off.</p></noscript>
</main>
<script type="application/json" id="document">{_inside(found)}</script>
<script>
{_part("page.js")}</script>
</body>
</html>
"""


def _inside(found: Document) -> str:
    """The data as JSON that ends no script element."""
    text = json.dumps(asdict(found), separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _part(name: str) -> str:
    return resources.files("graphopt.render.report").joinpath(name).read_text(encoding="utf-8")
