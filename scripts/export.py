"""Write a run as a model of the transformers library, with its tokenizer, for AutoModelForCausalLM.from_pretrained.

    python scripts/export.py runs/NAME --to hf --out exported/NAME

`learned` becomes GPT2LMHeadModel; `rope` and `crope` (its complex-linear weights written out as dense ones) become
GPTNeoXForCausalLM with a sequential residual. Before the command ends it loads what it wrote and compares the logits.
Needs requirements-dev.txt. An exported model runs in lm-evaluation-harness:
lm_eval --model hf --model_args pretrained=DIR --tasks …
"""

import argparse
import lzma
import sys
from pathlib import Path

import _root
import torch

from data.tokenizer import BYTE_CHARACTERS, VOCABULARY, load_tokenizer
from model import GPT
from nanope import checkpoint
from nanope.hf import as_transformers

TOLERANCE = 1e-4  # of logits


def tokenizer_of(name: str):
    """The tokenizer of data/, byte or gpt2, as one of transformers."""
    import transformers

    ours = load_tokenizer(name)
    vocabulary = {"".join(BYTE_CHARACTERS[b] for b in token): i for i, token in enumerate(ours.tokens)}
    vocabulary["<|endoftext|>"] = ours.eot
    merges = []
    if name == "gpt2":
        merges = [tuple(line.split(" ")) for line in lzma.decompress(VOCABULARY.read_bytes()).decode().splitlines()[1:]]
    return transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)


@torch.no_grad()
def largest_difference(folder: Path, model: GPT) -> float:
    """Of a logit, between the model in the folder and ours, on random tokens of the training length."""
    import transformers

    written = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(model.config.vocab_size, (1, model.config.block_size), generator=generator)
    return (written(input_ids=idx).logits - model(idx)[0]).abs().max().item()


def export(run: str, which: str, out: Path, tolerance: float = TOLERANCE) -> str:
    """Write the run's checkpoint to `out` and return a line about it. ValueError for what cannot be exported, and where
    a logit differs by more than the tolerance."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    state = checkpoint.load(checkpoint.find(run, which))
    model, tokenizer = checkpoint.build_model(state).eval(), state["tokenizer"]
    theirs = as_transformers(model, tokenizer["eot"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: choose another --out, or remove it")
    theirs.save_pretrained(out)
    tokenizer_of(tokenizer["name"]).save_pretrained(out)
    difference = largest_difference(out, model)
    if not difference < tolerance:
        raise ValueError(
            f"{out} was written, but its logits differ from the run's by {difference:.1e}, more than {tolerance}: "
            "do not use it, and report this"
        )
    kind = type(theirs).__name__
    return (
        f"{out}: {kind}, tokenizer {tokenizer['name']}, step {state['step']}; "
        f"largest difference of a logit {difference:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/export.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", help="a run's folder, or a checkpoint file")
    parser.add_argument(
        "--to", choices=("hf",), default="hf", help="hf: the transformers library (the default, and all there is)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a step number (default: last)")
    args = parser.parse_args()
    try:
        print(export(args.run, args.checkpoint, args.out))
    except ImportError:
        sys.exit("error: the export needs the transformers library: pip install -r requirements-dev.txt")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
