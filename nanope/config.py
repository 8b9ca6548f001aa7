"""The fields of a run: defaults, then a YAML file, then the command line."""

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_loader, set_parsing_settings

import schemes
from data.shards import PathError, given_path
from model import GPTConfig, resolve
from nanope.errors import nearest
from nanope.files import write_atomically
from nanope.schedule import jump
from nanope.values import number, read_yaml, read_yaml_file

set_parsing_settings(docstring_parse_attribute_docstrings=True)

# Fields that a config made before they existed does not have, with the value that it means by that
SINCE = {"window": 0, "pos_lr_matrices": False, "document_mask": False, "eot": None, "qk_norm": False}
SINCE |= {"logit_scale": "none", "logit_scale_start": 0.168, "init_pos_from_config": False, "data_order": "drawn"}
SINCE |= {"deterministic": False, "compile_mode": None, "activation_checkpointing": False, "fsdp": False}

# Fields of a model that change its attention, beside its scheme
SWITCHES = ("window", "document_mask", "qk_norm", "logit_scale", "logit_scale_start")

# Fields that do not change a result, beyond rounding; micro_batch_size does with dropout, whose masks it divides. Where
# a run is and what it tells meanwhile:
ELSEWHERE = ("out_dir", "resume", "device", "wandb", "verify_data")  # a study's names of runs do not depend on these
ROUTINE = ("micro_batch_size", "compile", "rank_timeout", "checkpoint_interval", "keep_checkpoints", "log_interval")
ROUTINE += ("sample_interval", "deterministic", "compile_mode", "activation_checkpointing", "fsdp")
# … and all of them: what is validated, and where the data lie, whose hash is compared apart
NEUTRAL = (*ELSEWHERE, *ROUTINE, "eval_interval", "eval_tokens", "data_dir")


@dataclass
class RunConfig:
    """One training run. Defaults: GPT-2 small (124M), 19,000 steps of 524,288 tokens."""

    data_dir: str = "data/fineweb-edu-gpt2"
    """Folder that data/prepare.py made."""
    verify_data: bool = False
    """Hash every shard at the start. Otherwise only folders up to 1 GiB are hashed; of larger ones sizes and
    fingerprints are checked."""
    out_dir: str = "runs/default"
    """The run's folder; one that already holds a run is an error unless resume is true."""

    block_size: int = 1024
    """Training length in tokens (T)."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads a block."""
    n_embd: int = 768
    """Model width (C), a multiple of n_head."""
    bias: bool = False
    """Biases in linear layers and LayerNorms, as GPT-2 has them."""
    dropout: float = 0.0
    """Dropout probability."""
    vocab_size: int | None = None
    """Vocabulary of the model; null is the data's, rounded up to a multiple of 64."""
    pos: list[str] | str = "rope"
    """Positional scheme: a name in model.SCHEMES, a combination (rope+alibi), or a class of your own
    (my_file.py:MyScheme). A list ([rope, rope, none]) cycles over the layers."""
    pos_options: dict = field(default_factory=dict)
    """Options of the scheme, e.g. {block: 4}; on the command line also --pos_options.block 4. For a combination or a
    list they go by name: {rope: {base: 5.0e+5}}."""
    window: list[int] | int = 0
    """Sliding-window attention: a token sees itself and the w-1 before it; 0 is full attention; a list cycles over the
    layers."""
    document_mask: bool = False
    """A token sees its own document alone, and positions restart there: in training, validation and evaluation."""
    eot: int | None = None
    """Id of the end-of-text token, which document_mask needs; null is the data's."""
    qk_norm: bool = False
    """Divide q and k of every head by their root mean square, before their positions, without a gain."""
    logit_scale: Literal["none", "log"] = "none"
    """log: multiply scores by s·log(visible keys) with s trained for each head (SSMax 2501.19399)."""
    logit_scale_start: float | None = 0.168
    """Where that s starts; null is 1/log(block_size)."""
    pos_lr_multiplier: float = 1.0
    """Learning-rate multiplier of the scheme's own undecayed parameters (comrope's P, carope's bias)."""
    pos_lr_matrices: bool = False
    """Whether pos_lr_multiplier reaches the scheme's own matrices too (carope's W). They keep their weight decay."""

    batch_tokens: int = 524288
    """Tokens per optimizer step over all ranks, a multiple of block_size."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Windows per forward pass and rank, a divisor of the batch. null is the largest of at most 16,384 tokens; on a GPU
    of at most 65,536, where --plan's estimate fits its memory. auto is the largest that fits, tried (on other devices
    as null). Both are found once and recorded."""
    max_steps: int = 19000
    """Optimizer steps of the whole run."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    min_lr: float = 6e-5
    """Final learning rate of the cosine and wsd schedules."""
    schedule: Literal["cosine", "step", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to min_lr; step, times lr_gamma every lr_step steps; wsd, constant and then linear to
    min_lr over the last decay_fraction of the run; constant."""
    lr_step: int = 1000
    """Schedule step: steps between two decays."""
    lr_gamma: float = 0.8
    """Schedule step: factor of a decay."""
    decay_fraction: float = 0.2
    """Schedule wsd: fraction of max_steps that decays."""
    warmup_steps: int = 750
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.1
    """AdamW's weight decay of embeddings and of matrices that act on activations; biases, norms and frequencies have
    none."""
    beta1: float = 0.9
    """AdamW's first beta."""
    beta2: float = 0.95
    """AdamW's second beta."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 does not clip (the norm is logged all the same)."""

    eval_interval: int = 500
    """Steps between validations; also validated at the start and the end. 0: only these."""
    eval_tokens: int = 1048576
    """Validation tokens: fixed windows spread evenly over the split."""
    checkpoint_interval: int = 500
    """Steps between checkpoints; one is also written at the end. 0: only that."""
    keep_checkpoints: int = 2
    """How many of the newest step_N.pt to keep."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    sample_interval: int = 0
    """Steps between samples of text, which go to metrics.jsonl and the screen. 0: none."""
    max_bad_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite (each is skipped) after which the run stops."""
    rank_timeout: float = 600.0
    """Seconds that ranks wait for one another before they end with an error."""
    resume: bool = False
    """Continue from the newest good checkpoint in out_dir, or start where there is none."""
    init_from: str | None = None
    """Start from weights only: a run's folder, a checkpoint, "gpt2" (hub) or a GPT-2 folder in transformers' layout."""
    init_pos_from_config: bool = False
    """With init_from: positions, window, qk_norm, logit_scale and document_mask are this config's, not those of the
    weights. Says which parameters are new and which are left behind (DroPE: configs/drope.yaml)."""

    seed: int = 1
    """Seed of initial weights and dropout."""
    data_seed: int = 1
    """Seed of the order of data, apart from seed."""
    data_order: Literal["feistel", "drawn"] = "feistel"
    """How the permutation of an epoch's windows is made: feistel computes each place when it is asked for; drawn draws
    and sorts them all (20 bytes a window and rank), as runs did before there was this field."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a torch device."""
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = "auto"
    """Autocast dtype; auto is bfloat16 on GPUs that have it, else float32. tf32 is float32 whose products on a GPU are
    rounded to TF32: faster, and carope's phases lose 2 to 3 digits by it."""
    compile: bool = False
    """torch.compile each block and the loss; falls back with a warning where no compiler works."""
    compile_mode: Literal["max-autotune-no-cudagraphs"] | None = None
    """torch.compile's mode: this one tries several kernels for each matrix product, which takes minutes once."""
    activation_checkpointing: bool = False
    """Keep of each block its input alone, and compute the rest again in the backward pass: about a third more
    arithmetic for a fraction of the memory. The same bits."""
    fsdp: bool = False
    """Divide parameters, gradients and the optimizer's state over the ranks (PyTorch's FSDP2), for models that one
    device does not hold. With one rank nothing is divided."""
    deterministic: bool = False
    """Equal commands give equal bits on CUDA too, at a cost in speed (docs/training.md); on a CPU they always do."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases; project and entity from WANDB_PROJECT and WANDB_ENTITY. Never asks for a login."""

    def model_config(self) -> GPTConfig:
        """The part that shapes the model."""
        return GPTConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(GPTConfig)})


def padded_vocabulary(vocab_size: int) -> int:
    """The vocabulary of a model for data of `vocab_size` tokens: the next multiple of 64, for fast matrix products."""
    return -(-vocab_size // 64) * 64


def with_vocabulary(config: RunConfig, vocab_size: int, eot: int | None) -> RunConfig:
    """The config for data of `vocab_size` tokens whose documents end with `eot`: its own vocab_size and, for
    document_mask, eot are filled in where they are None. ValueError where they do not fit the data."""
    if config.vocab_size is None:
        config = dataclasses.replace(config, vocab_size=padded_vocabulary(vocab_size))
    if config.vocab_size < vocab_size:
        raise ValueError(f"vocab_size {config.vocab_size} is smaller than the {vocab_size} of {config.data_dir}")
    if config.document_mask:
        config = dataclasses.replace(config, eot=eot if config.eot is None else config.eot)
        if config.eot is None:
            raise ValueError(
                f"document_mask needs data whose documents end with end-of-text: {config.data_dir} has none"
            )
        if eot is not None and config.eot != eot:
            raise ValueError(f"eot {config.eot} is not the end-of-text of {config.data_dir}, which is {eot}")
    return config


# ---- parsing

PATHS = ("data_dir", "out_dir", "init_from")


def types_in(annotation) -> set:
    """The types and the texts that an annotation allows."""
    return set().union(*map(types_in, get_args(annotation))) if get_args(annotation) else {annotation}


TYPES = {f.name: types_in(f.type) for f in dataclasses.fields(RunConfig)}


class Parser(ArgumentParser):
    """jsonargparse with the nearest valid name in its errors."""

    def error(self, message, ex=None):
        names = [f.name for f in dataclasses.fields(RunConfig)] + ["config"]
        if match := re.search(r"unrecognized arguments: -*(\w+)|Option '(\w+)' is not accepted", str(message)):
            message = f"{message}{nearest(match[1] or match[2], names)}"
        self.exit(2, f"error: {' '.join(str(message).split())} (train.py --help explains every field)\n")


@functools.cache  # it takes longer to make than to use
def run_parser(modes: Callable[[ArgumentParser], None] | None) -> Parser:
    description = "Train one GPT-2 with a positional scheme. Also under torchrun."
    parser = Parser(prog="train.py", description=description, allow_abbrev=False)
    if modes:
        modes(parser)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of fields; later arguments override it.")
    parser.add_class_arguments(RunConfig)
    return parser


def parse(
    arguments: list[str] | None = None, modes: Callable[[ArgumentParser], None] | None = None
) -> RunConfig | tuple[RunConfig, dict]:
    """The RunConfig of a command line: `--config FILE`, then `--field value …`. Exits with a message for what is
    unknown or of a wrong type. With modes, which adds arguments that are no fields of a run: (RunConfig, those)."""
    parser = run_parser(modes)
    try:
        words, files, options = understood(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        parser.error(str(error))
    values = parser.parse_args(words).as_dict()
    values.pop("config")
    others = {k: values.pop(k) for k in [*values] if k not in RunConfig.__dataclass_fields__}
    if absent := [f.name for f in dataclasses.fields(RunConfig) if values[f.name] is None and f.default is not None]:
        parser.error(f"{', '.join(absent)} must not be null")
    if files and not any(word.partition("=")[0] == "--pos_options" for word in words):
        before = parser.parse_args(files).pos
        values["pos_options"], lost = carried(values["pos_options"], before, values["pos"])
        if lost:
            text = f"note: {', '.join(lost)} of the file's pos_options, made for pos {schemes.label(before)}"
            print(f"{text}, do not apply to {schemes.label(values['pos'])} and are left out", file=sys.stderr)
    values["pos_options"] = merged(values["pos_options"], options)
    config = RunConfig(**values)
    return (config, others) if modes else config


def understood(arguments: list[str]) -> tuple[list[str], list[str], dict]:
    """A command line as jsonargparse reads it: with plain numbers and paths, and without --pos_options.OPTION and
    --pos_options.SCHEME.OPTION, of which it would keep the last of each SCHEME alone. Also its --config FILE alone, and
    those options as {OPTION: VALUE} and {SCHEME: {OPTION: VALUE}}. ValueError for what cannot be meant."""
    rest, files, options, words = [], [], {}, iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        field = name.partition(".")[0] if word.startswith("--") else ""
        known = name in TYPES or name == "config" or re.fullmatch(r"pos_options\.[^.]+(\.[^.]+)?", name)
        if not (field and known) or (not equals and (value := next(words, None)) is None):
            rest.append(word)
            continue
        try:
            if field == "pos_options" and name != field:
                *_, scheme, option = ["", *name.split(".")[1:]]
                value = number(read_yaml(value))
                options = merged(options, {scheme: {option: value}} if scheme else {option: value})
                continue
            value = word_of(name, value)
        except ValueError as error:
            raise ValueError(f"--{name}: {error}") from None
        rest += [f"--{name}", value]
        files += ["--config", value] * (name == "config")
    return rest, files, options


def word_of(name: str, text: str) -> str:
    """The value of a field, or of --config, as jsonargparse reads it."""
    if name in (*PATHS, "config") and text != "null":
        path = given_path(text)
        if name == "config" and Path(path).is_file():
            read_yaml_file(path)  # whose errors name the file
        return path
    if name == "pos_options" or {int, float} & TYPES.get(name, set()):
        value = as_field(name, read_yaml(text))
        if isinstance(value, str) or value is None:
            return text
        return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n")
    return text


def as_field(name: str, value):
    """A field's value in a YAML file, as the field means it: 1e6 is a whole number where one is wanted, `off` is no
    truth value where there is a choice of that name. ValueError for a path that cannot be."""
    types = TYPES.get(name, set())
    if isinstance(value, list):
        return [as_field(name, part) for part in value]
    if name == "pos_options" or {int, float} & types:
        value = number(value)
    if isinstance(value, float) and int in types and value.is_integer():
        return int(value)
    if value is False and "off" in types:
        return "off"
    if name in PATHS and isinstance(value, str):
        try:
            return given_path(value)
        except PathError as error:
            raise ValueError(f"{name}: {error}") from None
    return value


def read_fields(text: str):
    """The fields in a YAML text, each as as_field has it; jsonargparse reads other values by it too."""
    value = read_yaml(text)
    if isinstance(value, dict):
        return {k: as_field(k, v) for k, v in value.items()}
    return {} if value is None and text.strip() not in ("null", "~") else value


set_loader("yaml", read_fields, (ValueError,))


def carried(options: dict, before: str | list[str], now: str | list[str]) -> tuple[dict, list[str]]:
    """The options of a file's `pos` for another one, and the names of those that it does not take."""
    if before == now or any(schemes.problems_of(pos, {}) for pos in (before, now)):
        return options, []
    of_before, names = [[schemes.short(name) for name in schemes.names_in(pos)] for pos in (before, now)]
    own = {of_before[0]: options} if schemes.single(before) else options
    if not schemes.single(now):
        return {k: v for k, v in own.items() if k in names}, [k for k, v in own.items() if k not in names and v]
    given = own.get(names[0], options if schemes.single(before) else {})
    known = schemes.options_of(schemes.scheme_class(schemes.names_in(now)[0]))
    lost = [k for k in given if k not in known] + [k for k, v in own.items() if v and v is not given]
    return {k: v for k, v in given.items() if k in known}, lost


def merged(options: dict, changes: dict) -> dict:
    """pos_options with `changes`; those of several schemes, which go by name, are changed option by option."""
    inner = {k: v for k, v in changes.items() if isinstance(v, dict) and isinstance(options.get(k), dict)}
    return {**options, **changes, **{k: merged(options[k], v) for k, v in inner.items()}}


# ---- checks


def check(config: RunConfig) -> None:
    """ValueError that lists every field out of range. The model checks its own fields."""
    problems = []

    def require(names: str, holds: Callable, problem: str) -> None:
        for name in names.split():
            value = getattr(config, name)
            if not holds(value):
                problems.append(f"{name} {problem} {value}")

    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name} must be finite, not {value}")
    counts = "batch_tokens max_steps eval_tokens keep_checkpoints log_interval max_bad_steps lr_step block_size"
    require(counts, lambda n: n >= 1, "must be at least 1, not")
    amounts = "warmup_steps weight_decay grad_clip eval_interval checkpoint_interval sample_interval min_lr"
    require(f"{amounts} pos_lr_multiplier seed data_seed", lambda x: not x < 0, "must not be negative, but is")
    require("learning_rate lr_gamma rank_timeout", lambda x: x > 0, "must be positive, not")
    require("micro_batch_size vocab_size", lambda n: n in (None, "auto") or n >= 1, "must be at least 1 or null, not")
    require("data_dir out_dir", str.strip, "must name a folder, not")
    require("beta1 beta2", lambda x: 0 <= x < 1, "must lie in [0, 1), not")
    require("decay_fraction", lambda x: 0 < x <= 1, "must lie in (0, 1], not")
    if config.schedule in ("cosine", "wsd") and config.min_lr > config.learning_rate:
        problems.append(f"min_lr {config.min_lr} exceeds learning_rate {config.learning_rate}")
    if not problems and config.schedule == "wsd" and (text := jump(config)):
        problems.append(text)
    if config.block_size > 0 and config.batch_tokens % config.block_size:
        below = max(config.batch_tokens // config.block_size, 1) * config.block_size
        problems.append(
            f"batch_tokens {config.batch_tokens} must be a multiple of block_size {config.block_size}, such as {below}"
        )
    if config.compile_mode and not config.compile:
        problems.append(f"compile_mode {config.compile_mode} says how to compile: give compile true too")
    if config.fsdp and config.micro_batch_size == "auto":
        problems.append("micro_batch_size auto tries a model that is whole, which fsdp is not for: give a number")
    if config.init_pos_from_config and config.init_from is None:
        problems.append("init_pos_from_config says what of init_from's weights to leave: give init_from too")
    if problems:
        raise ValueError("; ".join(problems))


# ---- the fields of other runs


def config_of(fields: dict) -> RunConfig:
    """The config of a run's fields, without those that are none by now, and with what it means by those it lacks."""
    known = {field.name for field in dataclasses.fields(RunConfig)}
    return RunConfig(**{name: value for name, value in {**SINCE, **fields}.items() if name in known})


def completed(then: dict, config: RunConfig) -> dict:
    """The fields of a run, maybe made before some fields and options existed, with what it means by that; options of
    another scheme than the config's stay as they are. ValueError for what the scheme cannot have."""
    then = {**SINCE, **then}
    if then["pos"] == config.pos and isinstance(then.get("pos_options"), dict):
        open_ones = {"vocab_size": 1, "eot": 0}  # the data may not have filled them in yet
        shape = dataclasses.replace(config.model_config(), **open_ones, pos_options=then["pos_options"])
        then["pos_options"] = resolve(shape).pos_options
    return then


# ---- config.yaml


def write_yaml(config: RunConfig, path: Path) -> None:
    """Write every field to a YAML file, atomically. OSError where that fails."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    write_atomically(path, lambda file: file.write(text.encode()))
