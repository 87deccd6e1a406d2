"""The Python of the README and of docs, run as it stands there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(page):
    """Every block of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run(page, first_words, names):
    """The one block of a page that begins like this, with these names given; what it leaves."""
    (block,) = [block for block in blocks(page) if block.startswith(first_words)]
    exec(compile(block, page, "exec"), names)
    return names
