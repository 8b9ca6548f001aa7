"""Gone: scripts/report.py --csv does it."""

raise SystemExit(
    "scripts/gather.py is gone: use `python scripts/report.py --csv OUT.csv REPORT …`, OUT being - for the terminal"
)
