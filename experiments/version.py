"""Which version of Convoy this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """The installed distribution's version; "uninstalled" when run from a bare checkout."""
    try:
        return installed_version("convoy-sim")
    except PackageNotFoundError:
        return "uninstalled"
