"""The runs of a grid as a SLURM array."""

import shlex
from pathlib import Path

from nanope.study.files import Files
from nanope.study.grid import Grid
from nanope.study.runner import INTERRUPTED

SCRIPT = """\
#!/bin/bash
# {n} runs of the grid {name} as a SLURM array: an element a run, {ranks} process(es) each. Made by
#     {made}
# Submit it from the repository, with what your site needs: sbatch --partition=… --time=… FILE. A run that reaches its
# time limit or is preempted writes a checkpoint and is queued again. Submitted again, the script continues what failed.
# When all are done, the same command without --slurm finds nothing to run and makes the tables.{note}
#SBATCH --job-name=nanope-{name}
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task={cpus}{gpus}
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={out}/logs/slurm-%A-%a.log
set -u
cd "${{SLURM_SUBMIT_DIR:?start me with sbatch, from the repository}}"
runs=(
{runs}
)
${{SRUN-srun}} ${{PYTHON-.venv/bin/python}} {command} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}"
code=$?
if [ $code -eq {interrupted} ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit $code
"""


def write_script(path: Path, grid: Grid, files: Files, args, made: list[str], command: list[str]) -> str:
    """Write the script for all runs that are known and not done. Returns what to say about it.

    made: the command line that asks for the script. command: that of an element of the array, less --only.
    """
    out, runs = files.folder, [run.name for run in grid.runs(files) if not run.done()]
    if not runs:
        return f"every run in {out} is done: no script to write"
    waiting, note = sum(run is None for run in grid.main_runs(files)), ""
    if waiting:
        note = "\n# These are the trials of learning rates: when they are done, make the script again for the "
        note += f"{waiting} main runs."
    text = SCRIPT.format(
        n=len(runs), last=len(runs) - 1, runs="\n".join(f"    {name}" for name in runs), name=grid.name, out=out,
        ranks=args.ranks, cpus=args.ranks * args.threads,
        gpus="" if grid.fields.get("device") == "cpu" else f"\n#SBATCH --gpus-per-node={args.ranks}",
        made=shlex.join(made), command=shlex.join(command), interrupted=INTERRUPTED, note=note,
    )  # fmt: skip
    (out / "logs").mkdir(parents=True, exist_ok=True)  # SLURM does not make it
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return f"{path}: an array of {len(runs)} runs" + (", the trials; then make it again" if waiting else "")
