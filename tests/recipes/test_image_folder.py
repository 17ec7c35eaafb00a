"""A folder of colour pictures, as the page on data sets makes one, goes through VGG-5 without a change of code."""

import json
import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from lab.sweeping.recipe import load_recipe

from sj_robust.data import load_images

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "concepts" / "data.md"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The folder that the page's own code makes."""
    folder = tmp_path_factory.mktemp("photographs")
    (code,) = re.findall(r"```python\n(from importlib.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, str(PAGE), "exec"), {})
    return folder / "pictures"


def test_the_folder_is_what_the_page_says(pictures):
    splits = load_images(f"image_folder:{pictures}")
    assert (splits.image_shape, splits.classes) == ((3, 32, 32), 3)
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (606, 202)
    assert {int(splits.test[index][1]) for index in range(20)} == {0, 1, 2}
    columns = {part: {path.parts[-2:] for path in pictures.glob(f"{part}/*/*.png")} for part in ("train", "test")}
    assert not columns["train"] & columns["test"]
    x, _ = splits.test[0]
    assert not (x[0] == x[1]).all()  # coloured


def test_it_goes_through_vgg5(pictures, tmp_path):
    recipe = load_recipe(ROOT / "recipes" / "adv_train.py")
    arguments = ["--dataset", f"image_folder:{pictures}", "--model", "vgg5", "--T", "8", "--hidden", "[16, 16]"]
    small = ["--train-limit", "12", "--test-limit", "3", "--batch-size", "5", "--epochs", "1", "--device", "cpu"]
    try:
        recipe.main([*arguments, *small, "--reference", "false", "--output", str(tmp_path / "run")])
    finally:
        AcceleratorState._reset_state(True)  # for the tests that follow
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    counted = {score["attack"]: score["correct"] for score in report["scores"]}
    assert counted["pgd20"] <= counted["clean"] <= 3
    assert {score["total"] for score in report["scores"]} == {3}
    assert (tmp_path / "run" / "dlif_at" / "best.pt").is_file()
