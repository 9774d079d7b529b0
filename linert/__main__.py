"""``python -m linert``: the command line."""

from __future__ import annotations

from linert.runtime.cli import main

if __name__ == "__main__":
    main()
