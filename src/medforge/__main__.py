"""``python -m medforge``."""

from medforge.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
