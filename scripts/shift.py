"""Gone: shift is a protocol of eval.py."""

raise SystemExit("error: scripts/shift.py is gone: python eval.py --run RUN --protocol shift --offsets 0 256 4096")
