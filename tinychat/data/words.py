"""The words of a text, as rules and keys compare them."""

import re


def words(text: str) -> list[str]:
    """Return runs of letters, digits and underscores, in small letters."""
    return re.findall(r"\w+", text.casefold())
