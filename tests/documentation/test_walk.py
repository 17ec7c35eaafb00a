"""The recorded walk: in a clone, with an empty home, to the first failure, without a word about the machine."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import walk

VENV = "```bash\npython3 -m venv --without-pip .venv\n```\n"
PAGE = """# Page

<!-- example: not run: installs packages -->
```bash
python3 -m venv --without-pip .venv && echo spikingjelly==2.0.0
pwd; echo $HOME; ls -A $HOME; cd docs; export SAID=kept
```

```python
import os, sys
from pathlib import Path

place = Path(sys.prefix)
print(place, os.environ["HOME"], sys.executable)
```

<!-- example: add --epochs 1 -->
```bash
echo $SAID; pwd
for i in $(seq 100); do
  echo $i
done
```

```pycon
>>> place.name
'.venv'
```

<!-- example: options only: needs a GPU -->
```bash
false
```

```bash
python -m pytest
```
"""


def repository(folder, text):
    (folder / "docs").mkdir(parents=True)
    (folder / "docs" / "page.md").write_text(text)
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *command], cwd=folder, check=True)
    return folder


def walked(folder, text):
    output = folder / "record.md"
    source = ["--repository", str(repository(folder / "source", text)), "--pages", "docs/page.md"]
    code = walk.main(["--release", "0.0.0.0.14", "--output", str(output), *source])
    return code, output.read_text() if output.exists() else None


def test_a_walk_is_recorded(tmp_path):
    code, text = walked(tmp_path, PAGE)
    assert code == 0
    said = ("spikingjelly==0.0.0.0.14", "kept", "CLONE", "~", "CLONE/docs", "CLONE/.venv ~ CLONE/.venv/bin/python")
    for line in said:
        assert f"\n{line}\n" in text, line
    for reason in ("commands, skipped: needs a GPU", "commands, skipped: the tests, which take minutes"):
        assert re.search(rf"^Line \d+, {reason}$", text, re.MULTILINE)
    assert "\n[60 lines left out]\n" in text
    assert "Recorded by\n\n```text\npython tests/documentation/walk.py --release 0.0.0.0.14 --output FILE\n" in text
    table = text.partition("## Times\n")[2]
    assert len(re.findall(r"docs/page\.md:\d+ \| [\d.]+ \|", table)) == 6
    assert len(re.findall(r"docs/page\.md:\d+ \| skipped \|", table)) == 2
    for name in (str(tmp_path), sys.base_prefix, str(Path.home()), "2.0.0", "--epochs"):
        assert name not in text, name


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```bash\ntrue\necho because; exit 4\n```", "docs/page.md:5: exit code 4\necho because; exit 4\n\nbecause"),
        (f"{VENV}```python\n1 / 0\n```", "ZeroDivisionError"),
        (f"{VENV}```pycon\n>>> 1\n2\n```", "Expected:\n    2\nGot:\n    1"),
        (f"{VENV}```python\nimport os; os._exit(3)\n```", "docs/page.md:7: "),
    ],
)
def test_a_walk_ends_at_what_fails(block, message, tmp_path, capsys):
    code, text = walked(tmp_path, f"# P\n\n{block}\n\n```bash\ntouch {tmp_path}/after\n```\n")
    assert (code, text) == (1, None)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "after").exists()


def test_outputs_are_cleaned():
    one, two, three, four = (f"/{root}" for root in ("srv", "Users", "var", "tmp"))
    said = (
        "Downloading https://packages.example.org/a/b/torch-2.0-cp311.whl (10 MB)\n"
        "see https://arxiv.org/abs/2405.20694\n"
        "10%|#  \r50%|## \repoch 2\n"
        f"on {socket.gethostname()}: {one}/x/y.py:3, {two}/me, '{three}/z/best.pt' 8/255 and/or ~/runs .{four}/x\n"
    )
    assert walk.cleaned(said, {socket.gethostname(): "machine"}) == (
        "Downloading torch-2.0-cp311.whl (10 MB)\nsee https://arxiv.org/abs/2405.20694\nepoch 2\n"
        f"on machine: .../y.py:3, .../me, '.../best.pt' 8/255 and/or ~/runs .{four}/x"
    )


def test_a_block_of_text_with_fences_in_it():
    assert walk.fenced("a\n```text\nb\n```") == "````text\na\n```text\nb\n```\n````"
    assert walk.fenced("a") == "```text\na\n```"
