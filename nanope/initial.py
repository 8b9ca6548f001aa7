"""The model that a run starts from: a new one, or one with the weights of another run or of GPT-2."""

import dataclasses
import re
from pathlib import Path

from data.shards import Data
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from nanope.checkpoint import build_model, find, load, model_config_of
from nanope.config import SWITCHES, RunConfig, completed, merged
from schemes import layer_schemes, short, single

# What weights and a config must have in common, and what a config may replace with init_pos_from_config
SHAPE = ("n_layer", "n_head", "n_embd", "bias", "vocab_size")
POSITIONAL = ("pos", "pos_options", *(name for name in SWITCHES if name != "logit_scale_start"))


def initial_model(config: RunConfig, tokenizer_hash: str) -> tuple[GPT, str | None]:
    """A new model, or with init_from one with the weights of another; and with init_pos_from_config a sentence on what
    of these was left and what is new. ValueError unless the config names that one's architecture, then apart from what
    it says about positions, and the data has its tokenizer."""
    source = config.init_from
    if source is None:
        return GPT(config.model_config(), seed=config.seed), None
    if Path(source).is_file() or (Path(source) / "checkpoints").is_dir():
        state = load(find(source))
        tokenizer = state["tokenizer"]
        if tokenizer["sha256"] != tokenizer_hash:
            raise ValueError(
                f"init_from {source} was trained with the tokenizer {tokenizer['name']}, "
                f"which is not that of {config.data_dir}"
            )
    else:
        pretrained, gpt2 = GPT.from_pretrained(source), load_tokenizer("gpt2")
        if pretrained.config.vocab_size == gpt2.n_vocab and gpt2.sha256 != tokenizer_hash:
            raise ValueError(f"init_from {source} has GPT-2's vocabulary, and {config.data_dir} another tokenizer")
        state = {"config": dataclasses.asdict(pretrained.config), "model": pretrained.state_dict()}
    if config.init_pos_from_config:
        check_shape(state["config"], config, SHAPE)
        return with_weights(GPT(config.model_config(), seed=config.seed), state, source)
    model = build_model(state, block_size=config.block_size, dropout=config.dropout)
    check_shape(vars(model.config), config, SHAPE + POSITIONAL)
    return model, None


def check_shape(have: dict, config: RunConfig, names: tuple[str, ...]) -> None:
    """ValueError where the config has other values of the fields `names` than the weights that it starts from. Options
    that it does not name come with the weights."""
    differ = {}
    for name in names:
        own, asked = have[name], getattr(config, name)
        if name == "pos_options":
            given = {"pos": have["pos"], "pos_options": merged(own, asked)}
            if completed(given, config)["pos_options"] != own:
                differ[name] = {k: own.get(k) for k in asked}
        elif own != asked:
            differ[name] = own
    if not differ:
        return
    needs = ", ".join(f"--{name} {own} (the config says {getattr(config, name)})" for name, own in differ.items())
    text = f"init_from {config.init_from} has another architecture than the config; it needs {needs}"
    if differ.keys() <= {*POSITIONAL}:
        text += ", or --init_pos_from_config true to leave what the weights have for positions"
    raise ValueError(text)


def with_weights(model: GPT, state: dict, source: str) -> tuple[GPT, str]:
    """The model with all weights of a checkpoint that fit it, a scheme's own only where its layer has the same scheme
    with the same options, and a sentence on the others. ValueError where a table of positions is too short."""
    wpe, own, weights = "transformer.wpe.weight", model.state_dict(), model.renamed(state["model"])
    if wpe in own and wpe in weights:
        if len(weights[wpe]) < len(own[wpe]):
            raise ValueError(f"learned positions of {source} end at {len(weights[wpe])}, before {len(own[wpe])}")
        weights[wpe] = weights[wpe][: len(own[wpe])]
    made = model_config_of(state)
    taken = {name for name in own.keys() & weights.keys() if own[name].shape == weights[name].shape}
    for layer in range(made.n_layer):  # another scheme's parameters may have the same names: path and fox have gates
        then, now = parts_of(made, layer), parts_of(model.config, layer)
        for prefix in then.keys() | now.keys():
            if then.get(prefix) != now.get(prefix):
                taken -= {name for name in taken if name.startswith(f"transformer.h.{layer}.attn.pos.{prefix}")}
    model.load_state_dict({**own, **{name: weights[name] for name in taken}})
    left, new = in_short(weights.keys() - taken), in_short(own.keys() - taken)
    return model, f"weights of {source}: {len(taken)} tensors taken; left behind: {left}; new: {new}"


def parts_of(config: GPTConfig, layer: int) -> dict[str, tuple[str, dict]]:
    """How the names of a layer's own parameters begin, by scheme → the scheme and its options."""
    names, given = layer_schemes(config.pos, layer), config.pos_options
    options = {name: given if single(config.pos) else given.get(short(name)) for name in names}
    return {f"{short(name)}." * (len(names) > 1): (name, options[name]) for name in names}


def in_short(names) -> str:
    """Names of parameters, those of several layers as one: h.*.attn.pos.P."""
    short = {re.sub(r"^transformer\.(h\.\d+\.)?", lambda m: "h.*." if m[1] else "", name) for name in names}
    return ", ".join(sorted(short)) or "none"


def describe_tokens(model: GPT, data: Data) -> None:
    """Tell a new model the bytes of the data's tokens, where its scheme asks for coordinates in the text. ValueError
    where the tokenizer is not at hand."""
    if not model.described:
        tokenizer = load_tokenizer(data.manifest["tokenizer"]["name"])
        if tokenizer.sha256 != data.tokenizer_hash:
            raise ValueError(f"{data.folder} was made with another {tokenizer.name} tokenizer: prepare it again")
        model.describe_tokens(tokenizer.tokens, tokenizer.eot)
