"""Where a config differs from that of another run: `python train.py --config FILE --diff RUN`."""

import contextlib
import dataclasses
from pathlib import Path

from data.shards import Data, DataError, open_data
from nanope.checkpoint import read_metrics
from nanope.config import NEUTRAL, RunConfig, completed, with_vocabulary
from nanope.distributed import Ranks
from nanope.optim import resolve_batch
from nanope.values import read_yaml_file


def differences(config: RunConfig, run: Path) -> list[str]:
    """A line for each field in which `config` differs from that of the run in the folder `run`, and one for other data.
    Those that change the result come first. What is open until the run starts is not compared. OSError where there is
    no such run, ValueError where its config.yaml is none."""
    mine, data = resolved(config)
    path = run / "config.yaml" if run.is_dir() else run
    theirs = read_yaml_file(path)
    if "pos" not in theirs:
        raise ValueError(f"{path} is no config of a run")
    try:
        theirs = completed(theirs, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    lines = []  # (whether it leaves the result as it is, text)
    for field in dataclasses.fields(RunConfig):
        name = field.name
        there, here = theirs.get(name, "absent"), mine[name]
        left_open = here in (None, "auto") and field.default is None
        if there == here or left_open or name in ("out_dir", "resume"):
            continue
        if isinstance(here, dict) and isinstance(there, dict):
            options = sorted((k for k in here.keys() | there.keys() if here.get(k) != there.get(k)), key=str)
            there, here = ({k: d.get(k) for k in options} for d in (there, here))
        neutral = name in NEUTRAL and not (name == "micro_batch_size" and config.dropout)
        lines.append((neutral, f"{name}: {there} there, {here} here" + " (changes rounding at most)" * neutral))
    with contextlib.suppress(OSError, StopIteration):
        environments = (line.get("environment") for line in read_metrics(path.parent))
        there = next(e["data_hash"] for e in environments if isinstance(e, dict) and "data_hash" in e)
        if data and not data.is_of(there):
            lines.append((False, f"data: its hash is {there[:12]}… there, {data.hash[:12]}… here"))
    return [text for _, text in sorted(lines, key=lambda line: line[0])]


def resolved(config: RunConfig) -> tuple[dict, Data | None]:
    """The fields of a config as its run would record them, and its data. Data that is not here yet is None, and so is
    the vocabulary."""
    data = None
    with contextlib.suppress(DataError):
        data = open_data(config.data_dir, verify=False)
        config = with_vocabulary(config, data.vocab_size, data.eot)
    micro = config.micro_batch_size
    micro = resolve_batch(config, Ranks())[1] if micro not in (None, "auto") else None
    return {**completed(vars(config), config), "micro_batch_size": micro}, data
