"""Names missing packages of the extra ``recipes`` with the command to install them."""

from importlib.util import find_spec

_MODULES = (
    "accelerate",
    "docstring_parser",
    "matplotlib",
    "PIL",
    "rich",
    "scipy",
    "sklearn",
    "submitit",
    "tensorboard",
    "tyro",
    "yaml",
)

_missing = [name for name in _MODULES if find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"recipes, training and plots need the extra 'recipes', but {', '.join(_missing)} "
        "cannot be found: pip install 'sj_robust[recipes]' (in a clone, pip install -e "
        "'.[recipes]')",
        name=_missing[0],
    )
