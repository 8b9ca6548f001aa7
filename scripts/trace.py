"""Where a training step's time goes: a table by part of the model, and a trace for chrome://tracing or ui.perfetto.dev.

    python scripts/trace.py --config configs/quickstart.yaml --pos comrope --steps 5 --out trace.json
    python scripts/trace.py --run runs/gpt2-small --steps 3 --out trace.json    # a run's config; fields override it

Takes the fields of train.py. Eager and on one device; the weights are new, and the tokens random where data_dir holds
no data. On a GPU the times are those of its kernels, and the rest of the step is idle.
"""

import argparse
import sys
from pathlib import Path

import _root
import torch

from data.shards import given_path, output
from nanope.config import check, parse
from nanope.trace import by_part, table, trace
from schemes import label


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/trace.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=5, help="profiled optimizer steps, after two others (default: 5)")
    parser.add_argument("--out", type=given_path, required=True, help="file of the trace, .json or .json.gz")
    parser.add_argument("--run", type=given_path, help="a run's folder, whose config.yaml to take")
    args, fields = parser.parse_known_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, not {args.steps}")
    if args.run and not (Path(args.run) / "config.yaml").is_file():
        parser.error(f"--run {args.run} holds no config.yaml: expected the out_dir of a run")
    if not Path(args.out).parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {Path(args.out).parent}")
    c = parse([*(["--config", str(Path(args.run) / "config.yaml")] if args.run else []), *fields])
    try:
        check(c)
        profiler, device = trace(c, args.steps)
        profiler.export_chrome_trace(args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    output(
        f"{label(c.pos)}, {c.n_layer} layers × {c.n_embd}, length {c.block_size}, {c.batch_tokens:,} tokens a step; "
        f"{device}, {torch.get_num_threads()} CPU thread(s), {args.steps} steps\n"
    )
    output(table(by_part(profiler.events(), device), args.steps))


if __name__ == "__main__":
    main()
