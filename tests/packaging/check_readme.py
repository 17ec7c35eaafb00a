"""Runs what README prints, in its order, as a new user does: python check_readme.py PYTHON RELEASE
FOLDER

The environment holds what README has installed up to there, and nothing else. Three words are
replaced: REPOSITORY by a copy of the working tree, ``python3`` by PYTHON, and the release of
SpikingJelly. Blocks of Python up to the text that they print are one program, run by the Python of
``.venv``. Of the command that runs tests only the installation is run, since CI runs more of them.
Then ``smoke.py`` must pass. The clone and its ``.venv`` stay in FOLDER/sj_robust.
"""

import re
import sys
from pathlib import Path

from check_distribution import KERNEL, ROOT, check, copy_tree, run, say, smoke
from documentation.printed import unlike

BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def main(interpreter, release, folder):
    """Run the blocks, up to the first one that fails."""
    repository = folder / "repository"
    copy_tree(repository)
    git = ("git", "-C", repository, "-c", "user.name=check", "-c", "user.email=check@localhost")
    run(*git, "init", "-q")
    run(*git, "add", "--all")
    run(*git, "commit", "-q", "-m", "The working tree")
    clone = folder / "sj_robust"
    python = clone / ".venv" / "bin" / "python"
    program = ""
    for language, code in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        if language == "bash":
            command = code.replace("REPOSITORY", str(repository))
            command = re.sub(r"\bpython3\b", interpreter, command)
            command = command.replace("spikingjelly==2.0.0", f"spikingjelly=={release}")
            command = re.sub(r" && \S+ -m pytest .*", "", command)
            say(command.strip())
            run("bash", "-euo", "pipefail", "-c", command, cwd=clone if clone.exists() else folder)
        elif language == "python":
            program += code
        else:
            say(f"the program that begins with: {program.partition(chr(10))[0]}")
            fault = unlike(run(python, "-c", program, cwd=clone), code)
            check(fault is None, f"README, with SpikingJelly {release}: {fault}")
            program = ""
    check(not program, f"README does not show what this prints:\n{program}")
    smoke(python, kernel=(clone / KERNEL).is_file(), recipes=True, folder=clone)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve())
