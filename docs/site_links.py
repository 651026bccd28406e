"""A hook of mkdocs: links that leave docs/, which work in the repository, become plain text."""

import re

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **kwargs) -> str:
    return OUTSIDE.sub(r"\1", markdown)
