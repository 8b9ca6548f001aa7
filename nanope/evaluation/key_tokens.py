"""Key tokens after LongPPL (arXiv 2410.23771): the few tokens that a long context helps to predict.

One fixed model, the evaluator, scores the same targets with the shortest and with the longest context. A target is a
key token where its loss falls by more than FALL nats and ends below BELOW nats. The choice depends on the evaluator,
the data, the targets and the two lengths alone, so all runs that are evaluated alike share it.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data.shards import Data, Split
from nanope.errors import first_line
from nanope.evaluation.models import Subject, open_pretrained, open_run, why_not
from nanope.evaluation.options import Options
from nanope.evaluation.parts import FOLDER, Parts, source_hashes
from nanope.evaluation.protocols import Targets, checked_tokenizer, windows_of
from nanope.evaluation.scoring import Compute, score
from nanope.evaluation.statistics import document_interval

FALL, BELOW = 2.0, 2.0  # nats: α = 2 and β = -2 of the paper
FIGURES = ("key_nats_per_token", "key_tokens", "key_interval", "key_per_document", "key_sha256")
NONE = f"no token whose loss falls by more than {FALL:g} nats and ends below {BELOW:g} under the evaluator"


@dataclass
class KeyTokens:
    """Those of some targets: their indices among these, (n,), and what a report says of the choice."""

    chosen: np.ndarray
    about: dict

    def figures(self, nll: np.ndarray, targets: Targets) -> dict:
        """Of a row: nll (tokens,) of the targets in nats. Mean over key tokens, with its interval over documents."""
        found = dict.fromkeys(FIGURES) | {"key_tokens": len(self.chosen), "key_sha256": self.about["sha256"]}
        if not len(self.chosen):
            return found | {"key_reason": NONE}
        document, nll = targets.document[self.chosen], nll[self.chosen]
        present = np.flatnonzero(np.bincount(document))
        sums, counts = (np.bincount(document, of)[present] for of in (nll, None))
        each = {"document": present.tolist(), "nll": sums.tolist(), "tokens": counts.tolist()}
        return found | {
            "key_nats_per_token": float(nll.mean()),
            "key_interval": document_interval(sums, counts),
            "key_per_document": each,
        }


@dataclass
class Evaluator:
    """The model that chooses key tokens. What it chose is kept in memory, and beside its own evaluations where it is a
    run whose folder can be written."""

    subject: Subject
    name: str
    folder: Path | None = None
    made: dict = field(default_factory=dict)  # sha256 of targets, lengths, stride → KeyTokens

    def choose(self, split: Split, targets: Targets, lengths: list[int], stride: int, compute: Compute) -> KeyTokens:
        """The key tokens of same-targets `targets`, by the first and the last of `lengths`."""
        short, long = lengths[0], lengths[-1]
        key = {"targets": targets.sha256, "lengths": [short, long], "stride": stride, "key_tokens": [FALL, BELOW]}
        digest = str(key)
        if digest not in self.made:
            parts = self.parts(compute)
            found = parts.get(key)
            if found is None:
                found = parts.keep(key, self.compare(split, targets, short, long, stride, compute))
            chosen = np.array(found["chosen"], int)
            about = {"evaluator": self.name, "weights_sha256": self.subject.sha256, "lengths": [short, long]}
            about |= {"falls_by": FALL, "ends_below": BELOW, "tokens": len(chosen), "of": len(targets.positions)}
            about |= {"sha256": sha256_of(targets, chosen), "evaluator_nats": found["nats"]}
            self.made[digest] = KeyTokens(chosen, about)
        return self.made[digest]

    def compare(
        self, split: Split, targets: Targets, short: int, long: int, stride: int, compute: Compute
    ) -> dict[str, list]:
        """The indices of key tokens, and the evaluator's mean loss at both lengths."""
        model, nll = self.subject.model.to(compute.device), []
        for length in (short, long):
            windows = windows_of(targets, "same-targets", length, stride)
            nll.append(score(model, split, windows, compute, f"key tokens {length}")[0])
        chosen = np.flatnonzero((nll[0] - nll[1] > FALL) & (nll[1] < BELOW))
        return {"chosen": chosen.tolist(), "nats": [float(each.mean()) for each in nll]}

    def parts(self, compute: Compute) -> Parts:
        conditions = {"weights": self.subject.sha256, "data": self.subject.data.hash}
        conditions |= {"sources": source_hashes(self.subject.model), "torch": torch.__version__}
        conditions |= {"dtype": str(compute.dtype), "device": compute.device.type}
        return Parts(self.folder, conditions, compute.ranks)


def open_evaluator(name: str | None, data: Data, options: Options) -> Evaluator | None:
    """The evaluator `name`, a run or a model of transformers, None for none; options: resolved. ValueError where it has
    another tokenizer than the data, where it cannot reach the longest length, and where there is one length alone."""
    if name is None:
        return None
    lengths, split = options.lengths, options.split
    if len(lengths) < 2:
        raise ValueError(f"--key_tokens compares two contexts: give --lengths another one than {lengths[0]}")
    path = Path(name)
    try:
        ours = path.suffix == ".pt" or any((path / part).exists() for part in ("checkpoints", "last.pt", "best.pt"))
        subject = open_run(name, "last", str(data.folder)) if ours else open_pretrained(name, str(data.folder), split)
        checked_tokenizer(data, subject.model.lm_head.weight.size(0))
    except (ValueError, OSError) as error:
        raise ValueError(f"--key_tokens {name}: {first_line(error)}") from error
    subject.model.eval()
    if reason := why_not(subject.model, lengths[-1]):
        raise ValueError(f"--key_tokens {name} cannot score the longest length: {reason}")
    kept = path / "eval" / FOLDER if ours and path.is_dir() and os.access(path, os.W_OK) else None
    return Evaluator(subject, name, kept)


def sha256_of(targets: Targets, chosen: np.ndarray) -> str:
    """Equal for two evaluations that have the same key tokens, of the same split."""
    return hashlib.sha256(targets.positions[chosen].tobytes() + targets.ids[chosen].tobytes()).hexdigest()


def key_rows(rows: list[dict]) -> list[dict]:
    """Those rows of a report that have figures of key tokens, as rows of a protocol "key tokens" of their own."""
    return [
        {k: row[k] for k in ("length", "scaling", "factor", "cropping_baseline") if k in row}
        | {"protocol": "key tokens", "nats_per_token": row["key_nats_per_token"], "interval": row["key_interval"]}
        | {"tokens": row["key_tokens"], "targets_sha256": row["key_sha256"], "per_document": row["key_per_document"]}
        | {k: row[name] for k, name in (("reason", "key_reason"), ("reason", "reason")) if row.get(name)}
        for row in rows
        if "key_nats_per_token" in row
    ]
