"""What the recipes share: options, help, exit codes, the README of an output folder; needs the extra ``recipes``."""

import sj_robust._recipes_installed  # noqa: F401  # says what to install if one of its packages is missing
from lab.command_line.contents import describe_folder
from lab.command_line.options import named_arguments, parse_options, read_options, same_names
from lab.command_line.start import run_recipe
from lab.command_line.wrong_use import WrongUse, checked

__all__ = [
    "WrongUse",
    "checked",
    "describe_folder",
    "named_arguments",
    "parse_options",
    "read_options",
    "run_recipe",
    "same_names",
]
