"""What a page shows of a program's output; needs nothing but Python."""

import re

WORD = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?|[^\W\d]+|[^\w\s]")


def unlike(said: str, printed: str | None) -> str | None:
    """What is wrong with the printed text of a page, where a block really said something."""
    if printed is None:
        return None
    words = WORD.findall(said)
    shown = WORD.findall(printed.removeprefix("...\n"))
    if printed.startswith("...\n"):
        words = words[-len(shown) :]
    if len(words) == len(shown) and all(map(same, words, shown)):
        return None
    return f"the page shows\n{printed}and the block printed\n{said}"


def same(word: str, shown: str) -> bool:
    """Whether two words are equal, or numbers within a tenth."""
    try:
        return abs(float(word) - float(shown)) <= 0.1 * abs(float(shown))
    except ValueError:
        return word == shown
