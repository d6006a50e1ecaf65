"""Print what a project needs, so that an image can hold it in a layer below the project's own code.

Usage: python requirements.py pyproject.toml EXTRA,EXTRA
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Requirements of a project with some of its extras.

    Raises:
        SystemExit: it has no such extra.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in known]:
        raise SystemExit(f"{pyproject} has no extra {', '.join(unknown)}; it has {', '.join(known)}")
    return [*project["dependencies"], *(line for extra in extras for line in known[extra])]


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), [name for name in sys.argv[2].split(",") if name])))
