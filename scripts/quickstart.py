"""Gone: the quickstart is a sweep."""

raise SystemExit("scripts/quickstart.py is gone: use `make quickstart`, or `python scripts/sweep.py quickstart`")
