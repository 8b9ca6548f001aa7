"""What is evaluated: the model of a run or of transformers, its scaled copies, and the lengths that each can do."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from data.shards import Data, open_data
from model import GPT
from nanope import checkpoint
from nanope.evaluation.pretrained import Pretrained

Model = GPT | Pretrained


@dataclass
class Subject:
    """A model with the data to evaluate it on."""

    model: Model
    data: Data
    sha256: str  # of the checkpoint's file, or of the weights
    about: dict  # what a report says of it


def open_run(run: str, which: str, folder: str | None) -> Subject:
    """The model of a run of train.py at checkpoint `which`, and the data in `folder` (None: the run's own). ValueError
    where the run was trained with another tokenizer, and where its own folder holds other data by now."""
    path = checkpoint.find(run, which)
    state = checkpoint.load(path)
    data = open_data(folder or own_data(run, state["config"]))
    if state["tokenizer"]["sha256"] != data.tokenizer_hash:
        theirs, ours = data.manifest["tokenizer"]["name"], state["tokenizer"]["name"]
        raise ValueError(
            f"{run} was trained with tokenizer {ours}; {data.folder} has another, {theirs}: "
            "their perplexities do not compare"
        )
    trained_on = state.get("data_hash")
    other = None if trained_on is None else not data.is_of(trained_on)  # None: a checkpoint that does not know
    if other and not folder:
        raise ValueError(
            f"{run} was trained on other data than {data.folder.resolve()} holds (hash "
            f"{trained_on[:12]}… then, {data.hash[:12]}… here): give --data {data.folder} to evaluate on these all the "
            "same, or --data with the run's own"
        )
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    model = checkpoint.build_model(state)
    about = {"run": str(run), "step": state["step"], "checkpoint_sha256": digest, "data_dir": str(data.folder)}
    about |= {"training_data_hash": trained_on, "other_data": other}
    about |= {"pos": model.config.pos, "pos_options": model.config.pos_options}
    about |= {"parameters": model.parameter_count(), "config": state["config"]}
    return Subject(model, data, digest, about)


def own_data(run: str, config: dict) -> Path:
    """The data folder that a run's config names. ValueError where it is not there, with where it was looked for."""
    folder, out, path = Path(config["data_dir"]), Path(config["out_dir"]), Path(run)
    here = (path.parent if path.suffix == ".pt" else path).resolve()
    if folder.is_dir():
        return folder
    if folder.is_absolute():
        raise ValueError(f"{run} was trained on {folder}, which is not there: give --data with the folder")
    advice = "start eval.py where train.py was started, or give --data with the folder"
    # Where train.py was started, if the run is where it was written; an absolute path does not tell
    if not out.is_absolute() and here.parts[-len(out.parts) :] == out.parts:
        there = here.parents[len(out.parts) - 1] / folder
        advice = f"give --data {there}" if there.is_dir() else advice
    raise ValueError(
        f"{run} was trained on {folder}, a path from where train.py was started; from here it is {folder.resolve()}, "
        f"which is not there: {advice}"
    )


def open_pretrained(name: str, folder: str, split: str) -> Subject:
    """A model of transformers, and the data in `folder`. ValueError where its tokenizer is not that of the data."""
    data = open_data(folder)
    model = Pretrained(name)
    model.check_tokenizer(data, split)
    digest = model.sha256()
    about = {"model": name, "weights_sha256": digest, "data_dir": str(data.folder)}
    about |= {"pos": model.config.pos, "parameters": model.parameter_count()}
    return Subject(model, data, digest, about)


@dataclass
class Variant:
    """A model with one scaling of its frequencies; without a model there is a `reason`."""

    scaling: str
    factor: float
    model: Model | None
    reason: str | None
    asked: bool  # False for the unscaled model beside scaled ones: it has the cropping baseline, and that alone

    @property
    def label(self) -> dict:
        return {"scaling": self.scaling, "factor": self.factor}

    def reach(self, lengths: list[int]) -> dict[int, str | None]:
        """Each length, with None or the reason why it is out of reach."""
        return {length: self.reason or why_not(self.model, length) for length in lengths}

    def lengths(self, protocol: str, lengths: list[int], block_size: int) -> dict[int, str | None]:
        """The lengths that a protocol has rows for, each with None or the reason why it is out of reach."""
        reach = self.reach(lengths)
        able = [length for length in lengths if reach[length] is None]
        if not self.asked:
            return {length: None for length in able if length == block_size and protocol != "per-position"}
        if protocol == "per-position":  # by causality, shorter lengths have the same curve up to their end
            return {length: reach[length] for length in lengths if length in (*able[-1:], lengths[-1])}
        return reach


def why_not(model: Model, length: int) -> str | None:
    """Why a model cannot do a length; None where it can."""
    try:
        model.check_length(length)
    except ValueError as error:
        return str(error)
    return None


def scaled_models(model: Model, scalings: list[str], factor: float) -> list[Variant]:
    """The unscaled model, which is always there, and one for each other scaling. ValueError for a factor below 1."""
    if not 1 <= factor < float("inf"):
        raise ValueError(f"factor must be at least 1, not {factor}: it is the new context over the training length")
    model.eval()
    found = [Variant("none", 1.0, model, None, "none" in scalings)]
    for scaling in dict.fromkeys(scalings):
        if scaling != "none":
            scaled, reason = None, None
            try:
                scaled = model.scaled(scaling, factor)
            except ValueError as error:
                reason = f"no {scaling} scaling: {error}"
            found.append(Variant(scaling, factor, scaled, reason, True))
    return found
