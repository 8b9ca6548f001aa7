"""The protocol `task`: how often a model answers examples of its task right, by their length.

An example's answer is scored in one forward pass, each of its tokens after the right ones before it. It is an exact
match where the likeliest token is right at every place: then a greedy generation gives this answer too, and only then.
In recall and flipflop the answers stand between further questions, which are given, whatever the model said before.
Every model gets the same examples, which follow from the task, the length and --seed alone.

Beside it stand chance, which guesses evenly among the symbols that an answer may have, and the cropped model: the same
one with no more context than a row of training, in windows that end every half row.
"""

import hashlib

import numpy as np
import scipy
import torch
from tqdm import tqdm

from data.shards import Data
from data.tasks import TASKS, evaluation_examples
from data.tokenizer import load_tokenizer
from nanope.evaluation.models import Model, Variant
from nanope.evaluation.options import Options
from nanope.evaluation.parts import Parts
from nanope.evaluation.scoring import Compute, score_kept, sum_over_ranks
from nanope.evaluation.statistics import document_interval

FIGURES = ("accuracy", "interval", "token_accuracy", "token_interval", "nats_per_token", "per_example")


def training_length(data: Data, block_size: int, protocol: list[str]) -> int:
    """What 1x is: block_size, or for the protocol task the longest examples of the data. ValueError where it is not the
    protocol for these data."""
    task = data.manifest.get("task")
    if "task" not in protocol:
        if task and {*protocol} != {"shift"}:
            raise ValueError(f"{data.folder} holds examples of a task, whose answers alone are scored: --protocol task")
        return block_size
    if not task:
        raise ValueError(
            f"--protocol task is for runs on a task (python data/prepare.py task copy), and {data.folder} holds text"
        )
    return task["length"]


def evaluate_task(
    model: Model, variants: list[Variant], data: Data, options: Options, compute: Compute, parts: Parts
) -> list[dict]:
    """For each variant of a model, a row for each of options.lengths, of options.examples examples: see
    measure_answers. Null figures and a reason where it cannot reach the length; chance and the cropped model, which is
    unscaled, are there all the same. ValueError for a length that the task has no examples of."""
    task, rows, cropped = data.manifest["task"], [], {}
    texts = {n: evaluation_examples(task["name"], n, options.examples, options.seed) for n in options.lengths}
    made = {n: encoded(of_length, data) for n, of_length in texts.items()}  # (tokens, scored) of each length
    context = min(model.config.block_size, len(evaluation_examples(task["name"], task["length"], 1, 0)[0]))

    def kept(key: dict, of: Model, part: tuple, context: int, label: str) -> dict:
        found = parts.get(key)
        return parts.keep(key, measure_answers(of, *part, context, compute, label)) if found is None else found

    for variant in variants:
        for length, part in made.items():
            tokens, scored = part
            inputs = tokens.shape[1] - 1
            row = {"length": length, "protocol": "task", **variant.label, "inputs": inputs}
            row["cropping_baseline"] = length == task["length"] and variant.scaling == "none"
            row |= {"examples": len(tokens), **chance(task["name"], scored)}
            row["targets_sha256"] = hashlib.sha256(tokens.tobytes() + scored.tobytes()).hexdigest()
            if length not in cropped:
                key = {"cropped": context, "targets": row["targets_sha256"]}
                crop = kept(key, model, part, context, f"task {length} cropped")
                cropped[length] = {k: crop[k] for k in ("accuracy", "interval", "token_accuracy")}
            if reason := variant.reach([inputs])[inputs]:
                found = dict.fromkeys(FIGURES) | {"reason": reason}
            else:
                found = kept(row, variant.model, part, inputs, f"task {length}")
            rows.append(row | found | {"cropped": cropped[length]})
    return rows


def encoded(texts: list[str], data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of examples of one length, end-of-text behind each, and which are of the answer: (n, L+1) int64 and
    bool."""
    tokenizer, task = load_tokenizer(data.manifest["tokenizer"]["name"]), TASKS[data.manifest["task"]["name"]]
    tokens = np.stack([np.append(tokenizer.encode(text), data.eot).astype(np.int64) for text in texts])
    return tokens, np.stack([task.scored(text) for text in texts])


def chance(name: str, scored: np.ndarray) -> dict:
    """What guesses give that know where the answer ends, and so are right about the end of the text."""
    symbols, ends = scored[:, :-1].sum(1), scored[:, -1]
    part = 1 / TASKS[name].choices
    tokens = (part * symbols.sum() + ends.sum()) / scored.sum()
    return {"chance": float(np.mean(part**symbols)), "token_chance": float(tokens)}


def measure_answers(
    model: Model, tokens: np.ndarray, scored: np.ndarray, context: int, compute: Compute, label: str
) -> dict:
    """Figures of examples with at most `context` inputs before each answered token: exact match with its 95 % Wilson
    interval, the share of the answers' tokens with its t interval over examples, and their mean NLL in nats."""
    nll, hits = score_answers(model, tokens, scored, context, compute, label)
    answers, right = scored.sum(1), hits.sum(1)  # (n,) tokens of each example
    exact = right == answers
    interval = scipy.stats.binomtest(int(exact.sum()), len(exact)).proportion_ci(method="wilson")
    return {
        "accuracy": float(exact.mean()),
        "interval": [float(interval.low), float(interval.high)],
        "token_accuracy": float(right.sum() / answers.sum()),
        "token_interval": document_interval(right, answers),
        "nats_per_token": float(nll.sum() / answers.sum()),
        "per_example": {"right": right.tolist(), "answers": answers.tolist()},
    }


def score_answers(
    model: Model, tokens: np.ndarray, scored: np.ndarray, context: int, compute: Compute, label: str
) -> tuple[np.ndarray, np.ndarray]:
    """NLL and hits (n, L+1), float64 and bool, of the tokens of `scored`, 0 elsewhere. Where an example has more inputs
    than `context`, they are scored in windows of so many that end every context/2 tokens, counted from its end."""
    n, inputs = len(tokens), tokens.shape[1] - 1
    found, step = np.zeros((2, n, inputs + 1)), max(1, context // 2)
    targets = np.arange(inputs + 1)
    ends = np.maximum(inputs - (inputs - targets) // step * step, min(context, inputs))  # of each target's window
    jobs = []
    for end in np.unique(ends[scored.any(0)]):
        start = max(0, end - context)
        kept = scored[:, start : end + 1] & (ends[start : end + 1] == end)
        size = max(1, compute.batch_tokens // (end - start))
        jobs += [(slice(i, i + size), slice(start, end + 1), kept[i : i + size]) for i in range(0, n, size)]
    ranks = compute.ranks
    for number, (rows, window, kept) in enumerate(tqdm(jobs, desc=label, unit="batch", disable=compute.silent)):
        if number % ranks.world == ranks.rank and kept.any():
            part = found[:, rows, window]
            part[:, kept] += score_kept(model, tokens[rows, window], torch.from_numpy(kept[:, 1:]), compute.dtype)
    nll, hits = sum_over_ranks(found, model, ranks)
    return nll, hits > 0
