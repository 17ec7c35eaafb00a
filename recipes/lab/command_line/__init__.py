"""What the recipes share: options, help, exit codes, the README of an output folder; needs the
extra ``recipes``.
"""

import sys

try:
    # says what to install if one of its packages is missing
    import sj_robust.core.recipes_installed  # noqa: F401
except ModuleNotFoundError as error:
    own = "; in the clone: pip install -e '.[recipes]'"
    sys.exit(f"error: {error}{own if error.name == 'sj_robust' else ''}")

from lab.command_line.declared import changed, deciding, idle, plain, unused
from lab.command_line.read import (
    WrongUse,
    check_code,
    config_files,
    from_values,
    parse_options,
    read_file,
    read_options,
)
from lab.command_line.start import check_options, checked, describe_folder, run_recipe

__all__ = [
    "WrongUse",
    "changed",
    "check_code",
    "check_options",
    "checked",
    "config_files",
    "deciding",
    "describe_folder",
    "from_values",
    "idle",
    "parse_options",
    "plain",
    "read_file",
    "read_options",
    "run_recipe",
    "unused",
]
