"""Keeps the current folder off the import path: it may hold a `numpy.py` or a `tasks.py` of others.

It imports nothing that is not loaded yet, since that would be looked for in the current folder.
"""

import os
import sys

PACKAGES = os.path.abspath(os.path.join(__file__, "..", "..", ".."))  # noqa: PTH100, PTH118


def forget_current_folder() -> None:
    """Take the current folder off `sys.path`, and off that of every Python started from here.

    It stays where these packages themselves lie in it, as in a checkout.
    """
    sys.path[:] = [entry for entry in sys.path if _is_allowed(entry)]
    os.environ["PYTHONSAFEPATH"] = "1"
    inherited = os.environ.pop("PYTHONPATH", "").split(os.pathsep)
    if allowed := [entry for entry in inherited if _is_allowed(entry)]:
        os.environ["PYTHONPATH"] = os.pathsep.join(allowed)


def _is_allowed(entry: str) -> bool:
    if not entry:
        return False
    try:
        current_folder = os.path.realpath(os.getcwd())  # noqa: PTH109
    except FileNotFoundError:  # it was deleted
        return True
    folder = os.path.realpath(entry)
    return folder != current_folder or folder == os.path.realpath(PACKAGES)
