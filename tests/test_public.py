"""The public surface is the table of public_names.py: nothing beside it, and every name of it
documented.
"""

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from public_names import NEEDS_RECIPES, PUBLIC

import sj_robust

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sj_robust"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMPATIBILITY = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names]
SHARED = {"sj_robust.classifier": {"as_classifier", "check_classifier", "step_mode_of"}}
"""Names that other files of the package use and users must not, where the module is public."""

WITHOUT_EXAMPLE = {
    "sj_robust.doctor.main": "prints what report returns",
    "sj_robust.training.check_start": "the recipe adv_train.py is its example",
    "sj_robust.training.check_training": "the recipe adv_train.py is its example",
    "sj_robust.training.final_report": "the recipe adv_train.py is its example",
    "sj_robust.training.train": "the recipe adv_train.py is its example",
}
"""Functions that no example of a few lines can show, and why."""

IMPORT_NAMES = {
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "cupy-cuda12x": "cupy",
    "imagecorruptions-imaug": "imagecorruptions",
    "cupy-cuda13x": "cupy",
}


def modules():
    """Every module of the package, and of what its recipes share, by its dotted name."""
    for path in [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "recipes" / "lab").rglob("*.py"))]:
        root = ROOT if path.is_relative_to(PACKAGE) else ROOT / "recipes"
        parts = path.relative_to(root).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def is_private(module):
    if module.startswith("sj_robust.core"):
        return module != "sj_robust.core"
    return any(part.startswith("_") for part in module.split("."))


def test_every_part_is_in_the_table_or_internal():
    internal = {"sj_robust.core", "sj_robust.neuron.charging"}
    parts = {name for name, _ in modules() if re.fullmatch(r"sj_robust\.[a-z]\w*", name)}
    assert parts - internal <= set(PUBLIC)
    assert not internal & set(PUBLIC)


def test_every_module_says_what_it_offers():
    public = [
        (name, path)
        for name, path in modules()
        if not is_private(name) and not name.startswith("lab")
    ]
    silent = [name for name, path in public if "\n__all__" not in path.read_text(encoding="utf-8")]
    known = {"sj_robust.attacks.call", "sj_robust.ops.dlif"}
    assert set(silent) <= known, "__all__ says which of its names other files may use"


@pytest.mark.parametrize("module", PUBLIC)
def test_the_table_is_what_the_module_says_and_nothing_beside_it_leaks(module):
    """A package offers its names and its modules; a module's own functions and classes are offered
    or private.
    """
    loaded = importlib.import_module(module)
    assert sorted(loaded.__all__) == sorted(PUBLIC[module])
    hidden = {name for name in vars(loaded) if not name.startswith("_")} - set(PUBLIC[module])
    if hasattr(loaded, "__path__"):
        hidden = {name for name in hidden if not inspect.ismodule(getattr(loaded, name))}
        hidden -= {"importlib", "TYPE_CHECKING", "Any"} if module == "sj_robust" else set()
    else:
        hidden = {
            name for name in hidden if getattr(vars(loaded)[name], "__module__", None) == module
        }
        hidden -= SHARED.get(module, set())
    assert not hidden


@pytest.mark.parametrize(
    ("module", "name"), NAMES, ids=[f"{module}.{name}" for module, name in NAMES]
)
def test_name_is_described(module, name):
    value = getattr(importlib.import_module(module), name)
    if inspect.isfunction(value):
        text = inspect.getdoc(value)
        assert "Examples:" in text or f"{module}.{name}" in WITHOUT_EXAMPLE, (
            "a function needs an example that runs"
        )
        assert not undescribed(inspect.signature(value).parameters, text), (
            "Args: names every parameter"
        )
    elif inspect.isclass(value):
        text = value.__doc__
        if hasattr(value, "_fields"):
            assert not undescribed(value._fields, text), "Attributes: names every field"
        elif dataclasses.is_dataclass(value):
            described = " ".join(cls.__doc__ or "" for cls in value.__mro__)
            keys = [
                field.name for field in dataclasses.fields(value) if not field.name.startswith("_")
            ]
            assert not undescribed(keys, described), "Attributes: or Args: names every field"
        elif not issubclass(value, Exception | Warning) and not getattr(
            value, "_is_protocol", False
        ):
            assert "Examples:" in text, "a class that is no record needs an example that runs"
        assert text.strip()
    else:
        assert is_constant_described(module, name), f"{name} needs a docstring below its assignment"


def undescribed(names, docstring):
    """Names that have no line of their own in a docstring, nor in that of the module whose contract
    it takes over.
    """
    for module in re.findall(r"are those of\s+:mod:`([\w.]+)`", docstring):
        docstring += importlib.import_module(module).__doc__
    return [
        name
        for name in names
        if not re.search(
            rf"^ +\*{{0,2}}{name}: \S|^- ``{name}``: \S", docstring, flags=re.MULTILINE
        )
    ]


def is_constant_described(module, name):
    """Whether text stands below the assignment of a constant, wherever the module has it from."""
    if name == "__version__":
        return True
    tree = ast.parse(Path(importlib.import_module(module).__file__).read_text(encoding="utf-8"))
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.ImportFrom) and any(
            (alias.asname or alias.name) == name for alias in node.names
        ):
            return is_constant_described(node.module, name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            text = getattr(following, "value", None)
            return isinstance(text, ast.Constant) and isinstance(text.value, str)
    return False


def test_no_reason_outlives_its_function():
    assert {f"{module}.{name}" for module, name in NAMES} >= set(WITHOUT_EXAMPLE)
    for module, names in SHARED.items():
        assert all(hasattr(importlib.import_module(module), name) for name in names)


API = [
    name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
]


def test_every_name_is_on_an_api_page():
    """By its module, or by itself; check_site.py compares what the site then really shows."""
    for module, name in NAMES:
        if module == "sj_robust":  # a name that lives elsewhere too, where it is shown
            assert name == "__version__" or any(
                name in PUBLIC[other] for other in PUBLIC if other != module
            ), name
        else:
            same_as_file = (ROOT.joinpath(*module.split(".")) / f"{name}.py").is_file()
            shown = {f"{module}.{name}.{name}"} if same_as_file else {module, f"{module}.{name}"}
            assert shown & set(API), f"docs/api needs ::: {min(shown)}"


def test_api_pages_show_nothing_private():
    for shown in API:
        holders = {shown, shown.rpartition(".")[0], shown.rpartition(".")[0].rpartition(".")[0]}
        if shown != "sj_robust.core.environment.environment":  # which evaluation hands on
            assert holders & set(PUBLIC), f"{shown} is in docs/api and not public"
            assert not is_private(shown)


def python_texts():
    """Recipes, and the Python blocks of every page."""
    for path in sorted((ROOT / "recipes").glob("*.py")):
        yield path, path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "recipes" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]:
        text = path.read_text(encoding="utf-8")
        for kind, block in re.findall(
            r"^```(python|pycon)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE
        ):
            yield path, doctest.script_from_examples(block) if kind == "pycon" else block


def test_recipes_and_pages_use_public_names_only():
    public = set(PUBLIC) | {f"{module}.{name}" for module, name in NAMES}
    public |= {
        "sj_robust.core.recipes_installed",
        "sj_robust.core.console.duration",
        "sj_robust.core.console.working",
        "sj_robust.core.extras.check_extra",
        "sj_robust.core.folders.read_text",
    }  # of the recipes in this repository alone
    public |= {"sj_robust.core.environment.processor", "sj_robust.core.environment.version_of"}
    used = {
        (str(path.relative_to(ROOT)), name)
        for path, text in python_texts()
        for name in imported(ast.walk(ast.parse(text)))
        if name.split(".")[0] == "sj_robust"
    }
    assert not sorted((where, name) for where, name in used if name not in public)
    assert len(used) > 50, "the pages and recipes are found and read"


def test_parts_are_reached_from_the_package():
    parts = {module.split(".")[1] for module in PUBLIC if module.count(".") == 1}
    for part in parts:
        assert getattr(sj_robust, part) is sys.modules[f"sj_robust.{part}"]
    assert parts <= set(dir(sj_robust))
    with pytest.raises(AttributeError, match="no attribute 'atacks'"):
        _ = sj_robust.atacks


def test_what_needs_the_extra_says_so():
    assert set(PUBLIC) >= NEEDS_RECIPES
    for module in NEEDS_RECIPES:
        package = (
            importlib.import_module(module.rsplit(".", 1)[0]) if module.count(".") > 1 else None
        )
        texts = [importlib.import_module(module).__doc__, package.__doc__ if package else ""]
        needs = re.compile(r"[Nn]eeds?\s.*(extra|rich|matplotlib)", flags=re.DOTALL)
        assert any(needs.search(text) for text in texts), f"{module}: {texts[0]}"


def test_every_package_that_is_imported_is_declared():
    core = {import_name(requirement) for requirement in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"].values()
    known = core | {import_name(requirement) for extra in extras for requirement in extra}
    for folder in ("sj_robust", "recipes", "docs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for name in packages(ast.walk(tree)):
                assert name in known, (
                    f"{path.relative_to(ROOT)} imports {name}, which pyproject.toml does not name"
                )
    for module in PUBLIC.keys() - NEEDS_RECIPES:
        tree = ast.parse(Path(importlib.import_module(module).__file__).read_text(encoding="utf-8"))
        assert packages(tree.body) <= core, f"{module} must import with the dependencies alone"


def import_name(requirement):
    name = re.match(r"[\w-]+", requirement)[0]
    return IMPORT_NAMES.get(name, name)


def packages(nodes):
    """Packages that import statements name, neither ours nor Python's."""
    return (
        {name.split(".")[0] for name in imported(nodes)}
        - set(sys.stdlib_module_names)
        - {"sj_robust", "lab"}
    )


def imported(nodes):
    """Modules and names that import statements name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, day = re.search(
        r"^## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", text, flags=re.MULTILINE
    ).groups()
    assert re.fullmatch(r"\d+\.\d+\.\d+", version), "semantic versioning: major.minor.patch"
    assert version == sj_robust.__version__, f"CHANGELOG.md begins with {version} ({day})"


def test_version_has_one_place():
    states = re.compile(r"^__version__ *=", flags=re.MULTILINE)
    assert [
        path.name for _, path in modules() if states.search(path.read_text(encoding="utf-8"))
    ] == ["_version.py"]
    assert PROJECT["dynamic"] == ["version"]


def test_page_names_the_releases_that_are_supported():
    rows = dict(
        re.findall(
            r"^\| (Python|torch|SpikingJelly) \| ([^|]+?) \|", COMPATIBILITY, flags=re.MULTILINE
        )
    )
    pythons = [
        line.rsplit(" ", 1)[1]
        for line in PROJECT["classifiers"]
        if re.search(r"Python :: 3\.\d+$", line)
    ]
    assert rows["Python"] == ", ".join(pythons)
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    assert "torch" + rows["torch"].replace(" ", "") in PROJECT["dependencies"]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for tested in re.findall(r"^for release in (.+); do$", ci, flags=re.MULTILINE):
        assert sorted(tested.split()) == rows["SpikingJelly"].split(", ")


def test_page_names_the_version_of_every_file_format():
    found = {}
    for _, path in modules():
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r'^_?FORMAT = "(sj_robust\.\w+)"$', text, flags=re.MULTILINE):
            found[name] = re.search(r"^_?VERSION = (\d+)$", text, flags=re.MULTILINE)[1]
        found |= re.findall(r'format="(sj_robust[\w.]+)",\s+version=(\d+)', text)
    rows = re.findall(
        r"^\| `(sj_robust[\w.]+)` \|.*\| (\d+) \| [^|]+ \|$", COMPATIBILITY, flags=re.MULTILINE
    )
    assert dict(rows) == found
    assert len(found) >= 7


def test_page_names_every_module_that_is_public():
    items = re.findall(
        r"^- with the (.+?):(.+?)[;.]$", COMPATIBILITY, flags=re.MULTILINE | re.DOTALL
    )
    alone, recipes = (re.findall(r"`(sj_robust\b[\w.]*)`", modules) for _, modules in items)
    assert recipes == sorted(NEEDS_RECIPES)
    assert alone == sorted(PUBLIC.keys() - NEEDS_RECIPES)


def test_the_way_to_deprecate_a_name_works(tmp_path, monkeypatch):
    """The text on the page, as the end of a module."""
    (text,) = re.findall(r"^```python\n(.*?)^```", COMPATIBILITY, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "module_that_lost_a_name.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("module_that_lost_a_name")
    with pytest.warns(
        DeprecationWarning, match="called pgd .* goes in .* import pgd from sj_robust.attacks"
    ) as caught:
        assert module.linf_pgd is sj_robust.attacks.pgd
    assert caught[0].filename == __file__, "the warning points at the line that uses the name"
    with pytest.raises(AttributeError, match="module_that_lost_a_name.* no attribute 'pgd'"):
        _ = module.pgd


def test_citation_is_a_citation_file():
    """What the schema of the Citation File Format 1.2.0 requires of the keys that are there."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["cff-version"], citation["license"]) == ("1.2.0", PROJECT["license"])
    assert citation["type"] in ("software", "dataset")
    assert citation["message"]
    for work in [citation, *citation["references"]]:
        assert {"title", "authors", "type"} <= set(work)
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})
        if "doi" in work:
            assert re.fullmatch(r"10\.\d{4,9}(\.\d+)?/[A-Za-z0-9:/_;\-\.\(\)\[\]\\]+", work["doi"])
        assert isinstance(work.get("year", 0), int)
    assert {work["type"] for work in citation["references"]} <= {
        "article",
        "conference-paper",
        "software",
    }
    assert citation.get("version", sj_robust.__version__) == sj_robust.__version__
