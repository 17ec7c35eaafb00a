"""Words on the pages of the site: python tests/documentation/count_words.py

A word holds a letter or a digit. Blocks of code and comments do not count, tables do. Fails if the
site or its entry pages have more words than CONTRIBUTING.md allows.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENTRY = ("README.md", "docs/quickstart.md", "docs/your_network.md")
NOT_ON_THE_SITE = ("docs/concepts/architecture.md", "docs/mutation.md")
MOST, MOST_OF_ENTRY = 30_000, 3_500
FENCED = re.compile(r"^ *(```+|~~~+)(?!\{).*?\n(?:.*\n)*? *\1 *$", flags=re.MULTILINE)
COMMENT = re.compile(r"<!--.*?-->", flags=re.DOTALL)


def count(page: Path) -> int:
    """Words of a page."""
    text = FENCED.sub("", COMMENT.sub("", page.read_text(encoding="utf-8")))
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


def main() -> None:
    """Print every page with its words, the longest last, and both sums."""
    pages = [ROOT / "README.md", ROOT / "recipes" / "README.md", *ROOT.glob("docs/**/*.md")]
    pages = [page for page in pages if page.parent.name != "options"]  # the build writes them
    names = {page.relative_to(ROOT).as_posix(): page for page in pages}
    words = {name: count(page) for name, page in names.items() if name not in NOT_ON_THE_SITE}
    for name, number in sorted(words.items(), key=lambda item: item[1]):
        print(f"{number:6} {name}")
    everywhere = sum(words.values())
    entry = sum(words[name] for name in ENTRY)
    print(f"{everywhere:6} on the site (at most {MOST}), {entry} on entry pages ({MOST_OF_ENTRY})")
    sys.exit(everywhere > MOST or entry > MOST_OF_ENTRY)


if __name__ == "__main__":
    main()
