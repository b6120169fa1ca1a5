"""Bring the pages up to date: python docs/pages.py puts the stored tables in, and the right line numbers into links.

A table stands between <!-- NAME --> and <!-- end -->, where NAME is a study of benchmark/results/NAME.md. A link to a
line of a script has in backticks what the line says: [`def gae`](../ppo_clip.py#L262). tests/test_readme.py fails while
a page is not up to date, or a link names what is not in exactly one line.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def with_tables(text):
    def table(match):
        path = ROOT / "benchmark/results" / f"{match[1]}.md"
        return f"<!-- {match[1]} -->\n\n{path.read_text().strip()}\n\n<!-- end -->"

    return re.sub(r"<!-- ([\w.-]+) -->\n.*?<!-- end -->", table, text, flags=re.S)


def with_line_numbers(text):
    """Raises ValueError if a link's text is not in exactly one line of the script."""

    def link(match):
        lines = (ROOT / match[2]).read_text().splitlines()
        found = [number for number, line in enumerate(lines, 1) if match[1] in line]
        if len(found) != 1:
            raise ValueError(f"`{match[1]}` is in {len(found)} lines of {match[2]}")
        return f"[`{match[1]}`](../{match[2]}#L{found[0]})"

    return re.sub(r"\[`([^`]+)`\]\(\.\./(\w+\.py)#L\d+\)", link, text)


def updated(path):
    return with_line_numbers(with_tables(path.read_text()))


if __name__ == "__main__":
    for page in PAGES:
        new = updated(page)
        if new != page.read_text():
            page.write_text(new)
            print(f"updated {page.relative_to(ROOT)}", file=sys.stderr)
