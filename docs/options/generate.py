"""Pages of every option of each recipe, from the recipes themselves.

python docs/options/generate.py             # write docs/options/*.md
"""

import importlib
import sys
from pathlib import Path

from lab.command_line.description import describe
from lab.command_line.help import options_page

HERE = Path(__file__).parent
RECIPES = ("adv_train", "evaluate", "sweep", "figures", "benchmark")


def pages() -> dict[str, str]:
    """Text by name of the file."""
    recipes = str(HERE.parents[1] / "recipes")
    sys.path.insert(0, recipes)
    try:
        return {f"{name}.md": options_page(describe(importlib.import_module(name).Options)) for name in RECIPES}
    finally:
        sys.path.remove(recipes)


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")
