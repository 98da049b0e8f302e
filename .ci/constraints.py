"""Print the installed versions as pip constraints; a package that needs a newer Python than 3.10 gets a marker."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

OWN = {"medforge", "pip", "setuptools", "wheel"}


def main() -> None:
    """Write one line a distribution to stdout, sorted by name."""
    print("# Written by `make constraints`. The versions that the tests passed with, on Python 3.11.")
    found = {dist.metadata["Name"].lower().replace("_", "-"): dist for dist in metadata.distributions()}
    for name, dist in sorted(found.items()):
        if name in OWN:
            continue
        version = dist.version.split("+")[0]  # of torch==2.13.0+cpu, so that each machine takes its own build
        needs = SpecifierSet(dist.metadata["Requires-Python"] or "")
        marker = "" if needs.contains("3.10.99") else ' ; python_version >= "3.11"'
        print(f"{name}=={version}{marker}")


if __name__ == "__main__":
    main()
