"""What a grid will cost, by hand."""

import re

import pytest
from studies import ARMS, SWEEPS, arguments_of, prepared, write_grid, write_run

from nanope import REPO
from nanope.study.costs import LAUNCH, plan
from nanope.study.files import RunFolders
from nanope.study.grid import Grid


def planned(grid: Grid, out, *words) -> str:
    return plan(grid, RunFolders(out), arguments_of("--plan", *words, grid=grid))


@pytest.mark.slow
def test_plan_by_hand(tmp_path):
    """rope: vocabulary 320 × 32, 2 layers of 12·32² and norms; FLOPs a token 6N + 12·L·C·T; 30 steps of 64 tokens,
    validated on 64 tokens at 0, 10, 20 and 30, forward alone: a third of the FLOPs."""
    data = prepared(tmp_path)
    grid = Grid.read(write_grid(tmp_path / "g.yaml", data, seeds=3))
    parameters = 320 * 32 + 2 * 12 * 32**2 + 5 * 32
    flops = (6 * (320 * 32 + 2 * 12 * 32**2) + 12 * 2 * 32 * 16) * 30 * 64
    text = planned(grid, tmp_path / "out", "--tokens_per_s", "0.1", "--parallel", "2", "--price_per_hour", "1.5")
    hours = (30 * 64 + 4 * 64 / 3) / 0.1 / 3600  # 5.57 a run
    assert text.count(f"| waiting | {parameters:,} | 1,920 | {flops:.3g} | {hours:.2f} |") == 3  # and three of crope
    assert f"{6 * hours:.2f} run-hours" in text and f"{3 * hours:.2f} hours with 2 at a time" in text
    assert f"Cost: {6 * hours * 1.5:,.2f}" in text and not (tmp_path / "out").exists()
    odd = planned(grid, tmp_path / "out", "--tokens_per_s", "0.1", "--parallel", "4")  # six runs by four: two rounds
    assert f"{2 * hours:.2f} hours with 4 at a time" in odd
    broken = planned(Grid.read(write_grid(tmp_path / "b.yaml", data, arms=ARMS, seeds=1)), tmp_path / "out")
    assert "cannot run: pos_options: unknown option 'bas'" in broken and "1 cannot run" in broken


def test_plan_for_a_gpu_that_is_elsewhere(tmp_path):
    """carope-1's Small rope on 8 H100 at an MFU of 0.35, and another where asked; a step so small that launching its
    kernels takes longer; and what does not divide."""
    changes = {"arms": ["rope"], "settings": ["Small"], "seeds": 1}
    grid = Grid.read(SWEEPS / "carope-1.yaml", changes=changes)
    text = planned(grid, tmp_path, "--gpu", "h100", "--ranks", "8", "--price_per_hour", "2")
    tokens = 19000 * 524288
    flops = (6 * (50304 * 768 + 12 * 12 * 768**2) + 12 * 12 * 768 * 512) * tokens
    hours = flops * (1 + 39 * 2097152 / 3 / tokens) / (8 * 0.35 * 989e12) / 3600
    assert f"| {tokens:,} | {flops:.3g} | {hours:.2f} |" in text
    assert f"Cost: {hours * 8 * 2:,.2f} at 2.00 an hour for each of 8" in text
    assert f"{hours:.2f} hours with 1 at a time" in text and "8 H100 a run at 35% of 989 TFLOP/s" in text
    assert "at 40% of 312" in planned(grid, tmp_path, "--gpu", "a100", "--mfu", "0.4")

    changes = {"arms": ["rope"], "settings": ["2 × 512, width 64, γ 0.9 each 1,000"], "seeds": 1}
    small = Grid.read(SWEEPS / "crope-2.yaml", changes=changes)
    validated = 1 + 21 * 1048576 / 3 / 10_240_000
    assert f"| {10_000 * 4 * LAUNCH * validated / 3600:.2f} |" in planned(small, tmp_path, "--gpu", "H100")
    uneven = planned(small, tmp_path, "--gpu", "H100", "--ranks", "8")
    assert "cannot run: batch_tokens 1024 is 2 windows of 512, which do not divide over 8 ranks" in uneven

    speed = planned(Grid.read(SWEEPS / "carope-throughput.yaml"), tmp_path, "--gpu", "H100")
    assert f"| speed, scripts/bench.py | waiting | | {3 * 16 * 10 * 32 * 512:,} |" in speed


def test_plan_takes_the_measured_speed_and_what_is_left(tmp_path):
    """A run at step 10,000 of 30,000 has two thirds to go, at the speed of its shape's other runs."""
    fields = {"max_steps": 30_000, "eval_interval": 10_000, "eval_tokens": 640_000}
    path = write_grid(tmp_path / "g.yaml", arms=["rope"])
    grid, files = Grid.read(path, changes={"fields": fields}), RunFolders(tmp_path / "out")
    write_run(grid.runs(files)[0], [{"step": step, "tokens_per_s": 8.0} for step in (2, 10_000)])
    rows = [line for line in planned(grid, files.folder, "--parallel", "1").splitlines() if line.startswith("| rope")]
    tokens = 30_000 * 64 + 4 * 640_000 / 3
    hours = [float(row.split("|")[-2]) for row in rows]
    assert hours == [round(2 / 3 * tokens / 8 / 3600, 2), round(tokens / 8 / 3600, 2)]


@pytest.mark.slow
def test_the_hours_and_costs_in_the_docs_are_what_plan_prints(tmp_path):
    (tmp_path / "configs").symlink_to(REPO / "configs")  # and no data, as on a fresh machine
    texts = [path.read_text() for path in [REPO / "README.md", *(REPO / "docs").glob("*.md")]]
    pattern = r"^\| `python scripts/(?:reproduce|sweep)\.py ([^`]*)` \| (.*) \|$"
    rows = re.findall(pattern, "\n".join(texts), re.M)
    names = {arguments.split()[0] for arguments, _ in rows}
    assert names == {path.stem for path in SWEEPS.glob("*.yaml")} - {"quickstart", "schemes", "wandb"}
    for arguments, cells in rows:
        name, *words = arguments.split()
        grid = Grid.read(SWEEPS / f"{name}.yaml")
        given = ["--plan", "--gpu", "H100", "--price_per_hour", "2.5", *words]
        args = arguments_of(*given, grid=grid, root=tmp_path)
        text = plan(grid, RunFolders(tmp_path / "out"), args)
        figures = (
            r"^(\d+) runs, 0 done. Still to train: (\S+) FLOPs, (\S+) run-hours .*?, (\S+) hours .*^Cost: (\S+) at"
        )
        found = re.search(figures, text, re.M | re.S)
        assert found and cells == " | ".join(found.groups()), f"{arguments}: {' | '.join(found.groups())}"
