"""Baselines that are not installed, found in the folder that travelled; and a stub for `datasets`.

Wheels are unpacked, not imported from: Triton reads its kernels' sources from files.
"""

from __future__ import annotations

import importlib.util
import os
import zipfile
from pathlib import Path

from benchmarks import ROOT

STUBS = Path(__file__).parent / "stubs"


def environment(carried: Path, folder: Path) -> dict[str, str]:
    """Of the jobs: this checkout, then the wheels, which are unpacked into `folder`."""
    site, wheels = folder / "site", sorted((carried / "wheels").glob("*.whl"))
    names = []
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            names.append("-".join(wheel.name.split("-")[:2]))
        except (OSError, zipfile.BadZipFile) as error:
            print(f"!  {wheel.name}: {error}; it is left out", flush=True)
    paths = [ROOT, site, *(() if importlib.util.find_spec("datasets") else (STUBS,))]
    print(f"baselines' wheels: {', '.join(names) or 'none'}", flush=True)
    given = os.environ.get("PYTHONPATH", "")
    # The caller's own paths stay, behind these.
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([given] if given else [])])
    }
