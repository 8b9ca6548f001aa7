"""Its place is taken by `python train.py --config FILE --plan`, and for the table of schemes `--plan --schemes`."""

raise SystemExit(f"error: plan.py is gone. {__doc__}")
