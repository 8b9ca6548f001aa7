"""Write text from a run: python scripts/sample.py --run DIR --prompt TEXT [--tokens N]"""

import argparse
import sys

import _root
import torch

from data.tokenizer import load_tokenizer
from nanope import checkpoint
from nanope.distributed import pick_device


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/sample.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", required=True, help="a run's folder, or a checkpoint file")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a step number (default: last)")
    parser.add_argument("--prompt", default="\n", help="text to continue (default: a line break)")
    parser.add_argument("--tokens", type=int, default=300, help="tokens to write (default: 300)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=50, help="choose among the k likeliest; 0 among all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice (default: 0)")
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), or a torch device")
    args = parser.parse_args()
    try:
        state = checkpoint.load(checkpoint.find(args.run, args.checkpoint))
        tokenizer = load_tokenizer(state["tokenizer"]["name"])
        device = pick_device(args.device)
        model = checkpoint.build_model(state).to(device)
        prompt = tokenizer.encode(args.prompt).astype("int64")
        if not len(prompt):
            raise ValueError("the prompt is empty: give at least one character")
        try:
            model.check_length(len(prompt) + args.tokens - 1)
        except ValueError as error:
            most = max(0, model.config.block_size + 1 - len(prompt))
            raise ValueError(f"{error}; the prompt has {len(prompt)} tokens: use --tokens {most} or fewer") from None
        generator = torch.Generator(device).manual_seed(args.seed)
        idx = torch.from_numpy(prompt)[None].to(device)  # (1, T)
        out = model.generate(idx, args.tokens, args.temperature, args.top_k or None, generator)
        ids = out[0].tolist()
        end = ids.index(tokenizer.eot, len(prompt)) if tokenizer.eot in ids[len(prompt) :] else len(ids)
        print(tokenizer.decode(ids[:end]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
