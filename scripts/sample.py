"""Write text from a run: python scripts/sample.py --run DIR --prompt TEXT [--tokens N]"""

import argparse
import math
import sys

import _root
import numpy as np
import torch

from data.shards import given_path, output
from data.tokenizer import load_tokenizer
from nanope import checkpoint
from nanope.distributed import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/sample.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", type=given_path, required=True, help="a run's folder, or a checkpoint file")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a step number (default: last)")
    text = "text to continue; an empty one begins after an end of text (default: a line break)"
    parser.add_argument("--prompt", default="\n", help=text)
    parser.add_argument("--tokens", type=int, default=300, help="tokens to write (default: 300)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="choose among the k likeliest; 0 among all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice (default: 0)")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    args = parser.parse_args()
    for name in ("tokens", "temperature", "top_k"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name} must be finite and not negative, unlike {getattr(args, name)}")
    if not -(2**63) <= args.seed < 2**64:
        parser.error(f"--seed must have at most 64 bits, unlike {args.seed}")
    try:
        state = checkpoint.load(checkpoint.find(args.run, args.checkpoint))
        tokenizer = load_tokenizer(state["tokenizer"]["name"])
        device = pick_device(args.device)
        model = checkpoint.build_model(state).to(device)
        prompt = tokenizer.encode(args.prompt).astype("int64")
        if not len(prompt):
            prompt = np.array([tokenizer.eot])
        try:
            model.check_length(len(prompt) + args.tokens - 1)
        except ValueError as error:
            limit = model.config.block_size
            advice = f"use --tokens {limit + 1 - len(prompt)} or fewer"
            if len(prompt) > limit:
                advice = f"shorten it to {limit} or fewer; with --tokens it may have {limit + 1} together"
            raise ValueError(f"{error}; the prompt has {len(prompt)} tokens: {advice}") from None
        generator = torch.Generator(device).manual_seed(args.seed)
        idx = torch.from_numpy(prompt)[None].to(device)  # (1, T)
        out = model.generate(idx, args.tokens, args.temperature, args.top_k or None, generator)
        ids = out[0].tolist()
        end = ids.index(tokenizer.eot, len(prompt)) if tokenizer.eot in ids[len(prompt) :] else len(ids)
        output(tokenizer.decode(ids[:end]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
