import sys

sys.exit("error: scripts/plot_eval.py is gone: scripts/plot.py REPORT.json … --out figure.png draws reports")
