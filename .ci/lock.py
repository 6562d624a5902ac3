"""Write constraints.txt: the versions in this environment of all that the package, its tests and LAVIS need.

    python .ci/lock.py

It goes from requirement to requirement through what is installed, so a package that lies here by chance is left out.
A local version (``2.14.1+cpu``) loses its mark: it names a build, and which build pip takes is the machine's affair.
"""

from __future__ import annotations

import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOTS = ("lavis-chatbridge[test]",)
ALONE = ("salesforce-lavis",)  # installed without its requirements
LOCK = Path(__file__).resolve().parent.parent / "constraints.txt"
HEAD = """\
# All that `make install` puts into .venv, at the versions that the suite was last run with: Python {python}, {system}.
# Made by `make lock` (docs/contributing.md); used by .ci/run: `make install LOCK=constraints.txt`.
"""


def closure(roots: tuple[str, ...]) -> dict[str, str]:
    """Name and version of everything that the roots require here, directly or not; the roots themselves are left out.

    Raises:
        PackageNotFoundError: If something that is required is not installed.
    """
    found: dict[str, str] = {}
    waiting = [Requirement(root) for root in roots]
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        owner = distribution(wanted.name)
        found[canonicalize_name(wanted.name)] = Version(owner.version).public
        for extra in {"", *wanted.extras} - {extra for name, extra in seen if name == canonicalize_name(wanted.name)}:
            seen.add((canonicalize_name(wanted.name), extra))
            requirements = map(Requirement, owner.requires or ())
            waiting += [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name: version for name, version in found.items() if name not in {Requirement(root).name for root in roots}}


def main() -> None:
    """Write the file beside its place, then rename it."""
    pinned = closure(ROOTS) | {name: distribution(name).version for name in ALONE}
    head = HEAD.format(python=f"{sys.version_info[0]}.{sys.version_info[1]}", system=sys.platform.capitalize())
    draft = LOCK.with_suffix(".part")
    draft.write_text(head + "".join(f"{name}=={pinned[name]}\n" for name in sorted(pinned)), encoding="utf-8")
    draft.replace(LOCK)


if __name__ == "__main__":
    main()
