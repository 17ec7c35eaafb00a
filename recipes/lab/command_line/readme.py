"""The README of an output folder: what made it, what each file is, how to go on and how to draw
again.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from sj_robust.core.commands import as_called

_TEMPLATES = Path(__file__).with_name("readmes")


def describe_folder(folder: Path, recipe: str, arguments: Sequence[str]) -> None:
    """Write the README of an output folder, from ``readmes``; commands that wrote into it before
    stay in it.
    """
    from sj_robust.core.saved import write_whole  # imports torch

    path = folder / "README.md"
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    commands = earlier.partition("```text\n")[2].partition("\n```")[0].splitlines()
    commands.append(
        " ".join(shlex.join(["python", f"recipes/{recipe}.py", *arguments]).splitlines())
    )
    text = (
        (_TEMPLATES / f"{recipe}.md")
        .read_text(encoding="utf-8")
        .replace("FOLDER", shlex.quote(str(folder)))
    )
    text = text.replace("COMMANDS", "\n".join(dict.fromkeys(commands)), 1)
    write_whole(path, as_called(text))
