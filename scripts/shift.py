"""By how much a run's predictions change when all positions are shifted: ComRoPE's figure 5 (arXiv 2506.03737), on text.

    python scripts/shift.py --run runs/NAME --offsets 0 256 4096 --json runs/NAME/eval/shift.json

A relative scheme gives the same logits for a text at positions 0 … T-1 as at s … s+T-1. Here every angle of rotation is computed
for the shifted positions, and the NLL of every token of some validation windows is compared with that of the unshifted ones.
Schemes that know no absolute positions (alibi, none, and carope, whose phases are path sums) are unchanged by construction,
and are not given; tables of absolute positions are.
"""

import argparse
import sys
from pathlib import Path

import _root
import numpy as np
import torch

from data.shards import batch, open_data
from eval import write_json
from nanope import checkpoint
from nanope.distributed import pick_device


@torch.no_grad()
def losses(model, x: torch.Tensor, y: torch.Tensor, offset: int) -> torch.Tensor:
    """NLL (B, T) of targets y after inputs x (B, T), with all positions moved by `offset`."""
    return model.losses["none"](model.hidden(x, offset=offset), model.lm_head.weight, y).double().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/shift.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, help="a run's folder, or a checkpoint file")
    parser.add_argument("--data", help="data folder (default: the run's own)")
    parser.add_argument(
        "--offsets",
        type=int,
        nargs="+",
        default=[0, 256, 4096, 65536],
        help="positions of the first token (default: 0 256 4096 65536)",
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=8,
        help="validation windows of the training length, spread over the split (default: 8)",
    )
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    parser.add_argument("--json", type=Path, required=True, help="where to write the report")
    args = parser.parse_args()
    try:
        if min(args.offsets) < 0 or args.windows < 1:
            raise ValueError("--offsets must not be negative, and --windows at least 1")
        state = checkpoint.load(checkpoint.find(args.run))
        data = open_data(args.data or state["config"]["data_dir"])
        model = checkpoint.build_model(state).to(pick_device(args.device)).eval()
        if model.config.pos not in ("rope", "crope", "comrope"):
            raise ValueError(f"{model.config.pos} has no positions that could be shifted; rope, crope and comrope have")
        split, T = data.split("val"), model.config.block_size
        starts = np.linspace(0, len(split) - T - 1, args.windows).astype(int).tolist()
        x, y = (torch.from_numpy(a).to(model.lm_head.weight.device) for a in batch(split, starts, T))
        plain = losses(model, x, y, 0)
        rows = []
        for offset in args.offsets:
            nll = losses(model, x, y, offset)
            rows.append(
                {
                    "offset": offset,
                    "nats_per_token": nll.mean().item(),
                    "largest_change": (nll - plain).abs().max().item(),
                }
            )
        write_json(args.json, {"shift": rows, "tokens": plain.numel(), "step": state["step"], "data_hash": data.hash})
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for row in rows:
        print(
            f"positions + {row['offset']:,}: {row['nats_per_token']:.6f} nats/token, largest change of a token {row['largest_change']:.1e}"
        )


if __name__ == "__main__":
    main()
