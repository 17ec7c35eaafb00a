"""The README of an output folder: what made it, what each file is, how to go on and how to draw again."""

import shlex
from collections.abc import Sequence
from pathlib import Path

__all__ = ["describe_folder"]

_TEMPLATES = Path(__file__).with_name("readmes")


def describe_folder(folder: Path, recipe: str, arguments: Sequence[str]) -> None:
    """Write the README of an output folder; commands that wrote into it before stay in it. 写入输出目录的说明文件。

    Args:
        folder: The folder, which exists.
        recipe: Name of the recipe, which has a template in ``readmes``.
        arguments: Words of its command line.

    Raises:
        OSError: If it cannot be written.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> describe_folder(folder, "figures", ["--which", "neuron", "--output", str(folder)])
        >>> "python recipes/figures.py --which neuron" in (folder / "README.md").read_text()
        True
    """
    from sj_robust._saved import write_whole  # imports torch

    path = folder / "README.md"
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    commands = earlier.partition("```text\n")[2].partition("\n```")[0].splitlines()
    commands.append(" ".join(shlex.join(["python", f"recipes/{recipe}.py", *arguments]).splitlines()))
    text = (_TEMPLATES / f"{recipe}.md").read_text(encoding="utf-8").replace("FOLDER", shlex.quote(str(folder)))
    write_whole(path, text.replace("COMMANDS", "\n".join(dict.fromkeys(commands)), 1))
