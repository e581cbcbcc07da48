"""Prints what pyproject.toml wants for the base install and these extras: `python3 ops/docker/requirements.py worker`.

So that an image can install the dependencies before it has the code, and keeps them when only the code changes.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
if unknown := set(sys.argv[1:]) - extras.keys():
    sys.exit(f"no such extra: {', '.join(sorted(unknown))}; there are {', '.join(extras)}")
print("\n".join([*project["dependencies"], *(line for name in sys.argv[1:] for line in extras[name])]))
