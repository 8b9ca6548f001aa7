"""Run a grid: every arm with every seed, trained, evaluated, and put into one table with intervals and one figure.

    python scripts/sweep.py schemes                             # configs/sweeps/schemes.yaml, on all CPU cores or GPUs
    python scripts/sweep.py my_grid.yaml --out runs/mine        # a grid of your own: see nanope/study/grid.py
    python scripts/sweep.py GRID --plan --price_per_hour 2.5    # runs, FLOPs, hours and cost, before anything starts
    python scripts/sweep.py GRID --plan --gpu H100 --parallel 8 # for eight H100 that are elsewhere, a run each
    python scripts/sweep.py GRID --parallel 2 --threads 1       # two runs at a time of one thread each
    python scripts/sweep.py GRID --ranks 8                      # each run by torchrun on 8 GPUs
    python scripts/sweep.py GRID --slurm sweep.sbatch --ranks 4 && sbatch --time=8:00:00 sweep.sbatch
    python scripts/sweep.py GRID --status                       # from another terminal
    python scripts/sweep.py GRID --collect results/mine         # every finished run in one file; tables and figure
    python scripts/report.py results/mine                       # … made again from that file alone

Interrupt or kill it and start it again: finished runs are kept, the others continue from their checkpoints, and what
still runs is left alone and waited for. A run that fails does not stop the others. The runs lie under runs/NAME/, a
folder each, with logs/, table.md, table.tex, figure.png and .pdf. wandb's own sweeps need none of this: see
configs/sweeps/wandb.yaml.
"""

import _root

from nanope.study.sweep import main

if __name__ == "__main__":
    main("scripts/sweep.py", __doc__)
