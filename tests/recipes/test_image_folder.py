"""A folder of colour pictures, as the page on data sets makes one, goes through VGG-5 without a
change of code.
"""

import re
from contextlib import chdir
from shlex import split

import launch
import pytest

from sj_robust.data import load_images
from sj_robust.evaluation import Report

PAGE = launch.ROOT / "docs" / "concepts" / "data.md"


@pytest.mark.slow
def test_the_folder_is_what_the_page_says_and_goes_through_vgg5(tmp_path):
    (code,) = re.findall(
        r"```python\n(from importlib.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    with chdir(tmp_path):
        exec(compile(code, str(PAGE), "exec"), {})
    pictures = tmp_path / "pictures"
    splits = load_images(f"image_folder:{pictures}")
    assert (splits.image_shape, splits.classes) == ((3, 32, 32), 3)
    found = (len(splits.train) + len(splits.validation), len(splits.test))
    assert found == (606, 202)

    def named(part):
        return {path.parts[-2:] for path in pictures.glob(f"{part}/*/*.png")}

    assert not named("train") & named("test")
    x, _ = splits.test[0]
    assert not (x[0] == x[1]).all()  # coloured
    small = split("--train-limit 12 --test-limit 3 --batch-size 5 --epochs 1 --hidden 16 16")
    network = [
        "--dataset",
        f"image_folder:{pictures}",
        *split("--model vgg5 --T 8 --no-reference"),
    ]
    launch.in_process("adv_train", tmp_path, *network, *small, *split("--device cpu --output run"))
    report = Report.load(tmp_path / "run" / "report.json")
    assert report.under("pgd20").correct <= report.clean.correct
    assert report.clean.total == 3
    assert (tmp_path / "run" / "dlif_at" / "best.pt").is_file()
