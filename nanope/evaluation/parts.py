"""Finished rows of evaluations, kept in files, so that one that was interrupted goes on where it was."""

import contextlib
import hashlib
import json
from pathlib import Path

import schemes
from model import GPT
from nanope import REPO
from nanope.distributed import Ranks
from nanope.evaluation.models import Model
from nanope.files import write_atomically

FOLDER = ".parts"  # beside a report


class Parts:
    """A JSON file a row, in `folder` (None: nothing is kept). Its name is a hash of the row's key and of `conditions`,
    which hold everything that a row may depend on: weights, data, dtype, device, source (see source_hashes)."""

    def __init__(self, folder: Path | None = None, conditions: dict | None = None, ranks: Ranks | None = None):
        self.folder, self.conditions, self.ranks = folder, conditions, ranks or Ranks()

    def path(self, key: dict) -> Path:
        digest = hashlib.sha256(json.dumps([self.conditions, key], sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"

    def get(self, key: dict) -> dict | None:
        """The row of this key, the same on every rank; None where it is not kept."""
        row = None
        if self.folder and self.ranks.main:
            with contextlib.suppress(OSError, ValueError):
                row = json.loads(self.path(key).read_text())
        return self.ranks.first(row)

    def keep(self, key: dict, row: dict) -> dict:
        """Keep the row of this key, and return it."""
        if self.folder and self.ranks.main:
            write_json(self.path(key), row)
        return row


def source_hashes(model: Model) -> list[str]:
    """Of every file that a model's figures may depend on."""
    files = [REPO / "model.py", REPO / "eval.py"]
    files += [
        path for folder in ("nanope", "nanope/evaluation", "data") for path in sorted((REPO / folder).glob("*.py"))
    ]
    if isinstance(model, GPT):
        files += schemes.sources(model.config.pos) + schemes.sources("rope")  # rope is what a scaled model becomes
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))
