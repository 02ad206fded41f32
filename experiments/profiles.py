"""``convoy train`` and ``convoy import``: from kernel times to predictors."""

from __future__ import annotations

from pathlib import Path


def train_profile(folder: Path, out: Path | None) -> int:
    """Fit the predictors of the profile in ``folder`` and print their held-out errors."""
    from profiler.train import train

    print(train(folder, out=out).table())
    return 0


def import_aiconfigurator(device: str, out: Path) -> int:
    """Turn the tables of the installed ``aiconfigurator-core`` into a profile in a folder of ``out``."""
    from profiler.importers.aiconfigurator import import_profile

    profile = import_profile(device, out)
    print(f"{profile.path}: {', '.join(f'{info.key} ({info.rows} rows)' for info in profile.tables)}")
    print(f"next: convoy train {profile.path}")
    return 0
