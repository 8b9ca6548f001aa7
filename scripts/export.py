"""Write a run as a model of the transformers library, with its tokenizer, for AutoModelForCausalLM.from_pretrained.

    python scripts/export.py runs/NAME --to hf --out exported/NAME

`learned` becomes GPT2LMHeadModel; `rope` and `crope` (its complex-linear weights written out as dense ones) become
GPTNeoXForCausalLM with a sequential residual. The command loads what it wrote, compares the logits and the ids of odd
texts, and keeps it only where they are the run's. As in data/, the name of a special token within text is text. Needs
requirements-dev.txt. An exported model runs in lm-evaluation-harness:
lm_eval --model hf --model_args pretrained=DIR --tasks …
"""

import argparse
import contextlib
import shutil
import sys
from pathlib import Path

import _root
import torch
from safetensors import SafetensorError

from data.shards import as_path, given_path, output
from model import GPT
from nanope import checkpoint
from nanope.hf import as_transformers
from nanope.hf_tokenizer import check_tokenizer, tokenizer_of

TOLERANCE = 1e-4  # of logits


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
    a logit differs by more than the tolerance or a text has other ids: then nothing new is left."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    state = checkpoint.load(checkpoint.find(run, which))
    partial = out / ".partial"  # of an export that was killed, if it is there
    if out.exists() and (not out.is_dir() or {*out.iterdir()} - {partial}):
        raise ValueError(f"{out} exists: choose another --out, or remove it")
    model, tokenizer = checkpoint.build_model(state).eval(), checkpoint.run_tokenizer(state)
    if tokenizer.name == "characters":
        raise ValueError(
            f"{run} is a run on a task: its tokenizer of {tokenizer.eot} characters has no counterpart there"
        )
    theirs = as_transformers(model, tokenizer.eot)
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        theirs.save_pretrained(partial)
        tokenizer_of(tokenizer).save_pretrained(partial)
        check_tokenizer(partial, tokenizer)
        difference = largest_difference(partial, model)
        if not difference < tolerance:
            raise ValueError(
                f"{out} is removed again, so that you do not use it: its logits differ from the run's by "
                f"{difference:.1e}, more than {tolerance}; please report this"
            )
        for path in partial.iterdir():
            path.rename(out / path.name)
    except SafetensorError as error:  # such as of a full disk
        raise OSError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # the export is there
            for folder in new:
                folder.rmdir()
    return (
        f"{out}: {type(theirs).__name__}, tokenizer {tokenizer.name}, step {state['step']}; "
        f"largest difference of a logit {difference:.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/export.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=given_path, help="a run's folder, or a checkpoint file")
    parser.add_argument(
        "--to", choices=("hf",), default="hf", help="hf: the transformers library (the default, and all there is)"
    )
    parser.add_argument("--out", type=as_path, required=True, help="folder to write, new or empty")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a step number (default: last)")
    args = parser.parse_args()
    try:
        output(export(args.run, args.checkpoint, args.out))
    except ImportError:
        sys.exit("error: the export needs the transformers library: pip install -r requirements-dev.txt")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
