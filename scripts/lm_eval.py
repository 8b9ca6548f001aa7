"""lm-evaluation-harness with a run of any scheme.

    python scripts/lm_eval.py --run runs/NAME --tasks hellaswag,piqa --output_path results.json
    python scripts/lm_eval.py --run runs/NAME --max_length 4096 --tasks my_task --include_path FOLDER --limit 100
    python scripts/lm_eval.py --model nanope --model_args run=runs/NAME,max_length=4096 --tasks my_task

It registers the model `nanope` with the harness, and then is the harness's own command: all options but those below go
to it (`lm_eval run --help`). Needs the package lm-eval, which is in requirements-dev.txt.
"""

import argparse
import json
import signal
import sys
import tempfile

import _root

from data.shards import given_path
from nanope import checkpoint
from nanope.convert import SCALINGS


def model_options(parser: argparse.ArgumentParser) -> None:
    add, nothing = parser.add_argument, argparse.SUPPRESS
    add("--run", type=given_path, default=nothing, help="a run's folder, or a checkpoint file")
    add("--checkpoint", default=nothing, help="last, best, or a step number (default: last)")
    text = "tokens of an input, of which longer ones keep the last (default: the training length)"
    add("--max_length", type=int, default=nothing, help=text)
    text = "of autocast; tf32 is float32 with a GPU's products in TF32 (default: float32)"
    add("--dtype", choices=("float32", "tf32", "bfloat16", "float16"), default=nothing, help=text)
    add("--scaling", choices=SCALINGS, default=nothing, help="of frequencies (default: none)")
    add("--factor", type=float, default=nothing, help="of --scaling: new context over training length")


def harness_arguments(given: dict, theirs: list[str], folder: str) -> list[str]:
    """The harness's command line for a run and what was given beside it. RULER measures its prompts with a tokenizer of
    transformers: where there is metadata without one, the run's is written to `folder`. ValueError, OSError where the
    run cannot be opened: sooner than the harness says so, which first reads all its tasks."""
    path = checkpoint.find(given["run"], given.get("checkpoint", "last"))
    metadata = [text for text in theirs if text.startswith("--metadata")]
    if metadata and not any("tokenizer" in text for text in theirs):
        from nanope.hf_tokenizer import tokenizer_of

        tokenizer_of(checkpoint.run_tokenizer(checkpoint.load(path))).save_pretrained(folder)
        theirs = [*theirs, "--metadata", json.dumps({"tokenizer": folder})]
    return [*theirs, "--model", "nanope", "--model_args", json.dumps(given)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/lm_eval.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model_options(parser)
    args, theirs = parser.parse_known_args()
    given = vars(args)
    if given and "run" not in given:
        parser.error(f"--{next(iter(given))} goes with --run")
    if given and any(text.partition("=")[0] in ("--model", "-M") for text in theirs):
        parser.error("--run is --model nanope: give one of them")
    try:
        from lm_eval.__main__ import cli_evaluate

        import nanope.evaluation.harness  # noqa: F401
    except ImportError as error:
        what = "" if (error.name or "").startswith("lm_eval") else f" ({error})"
        sys.exit(f"error: this needs lm-evaluation-harness{what}: pip install lm-eval")
    try:
        with tempfile.TemporaryDirectory() as folder:
            sys.argv = ["lm_eval", *(harness_arguments(given, theirs, folder) if given else theirs)]
            cli_evaluate()
    except (ValueError, OSError, ImportError) as error:  # the harness has its own way with some, as of datasets
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
