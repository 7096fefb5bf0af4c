"""Functions of the user's, by name: `module:function` on the command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from optuna_quantune.errors import InputError


def import_function(name: str, argument: str) -> Any:
    """What `module:function` names; a module is looked for in the current folder, too.

    Args:
        name: The module and the name in it, with a colon between.
        argument: What the user gave it as, for messages.

    Raises:
        InputError: If it cannot be imported or called.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise InputError(f"{argument} {name!r}: must be module:function")
    if "/" in module_name or module_name.endswith(".py"):
        raise InputError(
            f"{argument} {name!r}: is a file; give the module's name, without folder and .py, and "
            "call from its folder"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever a user's module raises
        raise InputError(
            f"{argument} {name!r}: cannot be imported ({type(error).__name__}: {error})"
        ) from error
    if not callable(function):
        raise InputError(f"{argument} {name!r}: is a {type(function).__name__}, not a function")
    return function
