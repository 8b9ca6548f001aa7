"""lm-evaluation-harness for runs of every scheme: its model `nanope`.

To import this file registers the model; it needs the package lm-eval. How texts become tokens, what is cut and what is
scored are the harness's own conventions, as its model `hf` has them. The computation is that of eval.py.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from nanope import checkpoint
from nanope.distributed import autocast, pick_device, use_dtype
from nanope.errors import nearest
from nanope.evaluation.scoring import score_tokens

OPTIONS = "run, checkpoint, max_length, dtype, device, batch_size, max_batch_size, scaling, factor"
DTYPES = ("float32", "tf32", "bfloat16", "float16")
MAX_GEN_TOKS = 256  # of a request that does not say; hf has the same
# Further options of generation, as they are without any effect; the last three have none where nothing is sampled
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "length_penalty": 1, "top_p": 1, "min_p": 0, "typical_p": 1}
SAMPLING = ("top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class Generation:
    """How a request wants its text: at most `tokens`, or up to one of the texts `until`."""

    tokens: int
    until: tuple[str, ...]
    temperature: float  # 0: the likeliest token
    top_k: int | None

    @classmethod
    def of(cls, asked: dict) -> "Generation":
        """As the harness reads generation_kwargs. ValueError for options that change the text and are not here."""
        rest = normalize_gen_kwargs(asked, MAX_GEN_TOKS)
        tokens, until = rest.pop("max_gen_toks"), tuple(text for text in rest.pop("until") if text)
        temperature = float(rest.pop("temperature", 0.0)) * bool(rest.pop("do_sample"))
        if not temperature:
            rest = {name: value for name, value in rest.items() if name not in SAMPLING}
        top_k = rest.pop("top_k", None) or None
        for name, value in rest.items():
            if name not in NEUTRAL or value != NEUTRAL[name]:
                raise ValueError(
                    f"generation with {name}={value} is not possible here; there are do_sample, temperature, top_k, "
                    "max_gen_toks, until (a task's generation_kwargs, or --gen_kwargs)"
                )
        return cls(tokens, until, temperature, top_k)


@register_model("nanope")
class NanopeLM(TemplateLM):
    """A run of train.py.

    run: its folder, or a checkpoint file; checkpoint: last, best or a step
    max_length: of inputs, in tokens; longer ones lose tokens on the left (default: the training length)
    dtype: of autocast, float32, bfloat16 or float16, or tf32 on a GPU; device: auto, or a torch device
    batch_size: requests at a time, or auto: 4,096 tokens on a CPU, else 65,536, at most max_batch_size requests
    scaling, factor: of the frequencies, as in eval.py

    Requests of one length go through the model together: there is no padding. ValueError or OSError for what cannot
    be opened, and for a max_length that the scheme cannot reach.
    """

    def __init__(
        self,
        run: str | None = None,
        checkpoint: str | int = "last",
        max_length: int | None = None,
        dtype: str = "float32",
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        scaling: str = "none",
        factor: float | None = None,
        trust_remote_code: bool = False,  # the harness hands it on where a task asks for it; nothing here does
        **unknown,
    ):
        super().__init__()
        for name in unknown:
            close = nearest(name, OPTIONS.split(", "))
            raise ValueError(f"model nanope has no argument {name!r}{close or '.'} There are: {OPTIONS}")
        if run is None:
            raise ValueError("model nanope needs a run: --model_args run=runs/NAME")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        # The harness also knows auto:N
        self.batch_size = "auto" if str(batch_size).startswith("auto") else count_of("batch_size", batch_size)
        self.max_batch_size = max_batch_size
        self._device = pick_device(str(device))
        self.dtype = use_dtype(dtype, self._device)
        self.open(str(run), str(checkpoint), scaling, factor)
        self.max_length = count_of("max_length", self.model.config.block_size if max_length is None else max_length)
        self.model.check_length(self.max_length)
        self.about |= {"max_length": self.max_length, "model_dtype": dtype, "scaling": scaling, "factor": factor}

    def open(self, run: str, which: str, scaling: str, factor: float | None) -> None:
        path = checkpoint.find(run, which)
        state = checkpoint.load(path)
        self.tokenizer = checkpoint.run_tokenizer(state)
        if self.tokenizer.name == "characters":
            raise ValueError(
                f"{run} is a run on a task, and cannot read other text: eval.py --protocol task evaluates it"
            )
        model = checkpoint.build_model(state)
        pos = {"pos": model.config.pos, "pos_options": model.config.pos_options}
        if (scaling == "none") != (factor is None):
            raise ValueError("scaling and factor (new context over training length) go together")
        if scaling != "none":
            model = model.scaled(scaling, float(factor))
        self.model = model.to(self._device).eval()
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.about = {"run": run, "step": state["step"], "checkpoint_sha256": digest, **pos}
        self.about |= {"model_num_parameters": model.parameter_count()}

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "NanopeLM":
        """Of model_args, and the harness's own options for what they do not name: it always gives a batch size of 1,
        and the device cuda:0 also where there is none."""
        theirs = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if theirs.get("device") == "cuda:0":
            theirs["device"] = "auto"
        return cls(**theirs | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "NanopeLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict:
        """What the harness writes into its results."""
        return self.about

    # ---- tokens

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eot

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text. No token is added, and the name of a special token is text, as in training."""
        return self.tokenizer.encode(string).tolist()

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        raise ValueError("a run of train.py has no chat template: leave out --apply_chat_template")

    # ---- requests

    def batches(self, keys: list[tuple], label: str, silent: bool) -> Iterator[list[int]]:
        """Indices of requests that go through the model together. Their keys, of which the first is the length, are
        equal. The longest come first: if memory ends, it ends at once."""
        order = sorted(range(len(keys)), key=lambda i: keys[i], reverse=True)
        with tqdm(total=len(keys), desc=label, disable=silent or None) as progress:
            for key, same in itertools.groupby(order, key=lambda i: keys[i]):
                while part := [*itertools.islice(same, self.rows(key[0]))]:
                    yield part
                    progress.update(len(part))

    def rows(self, length: int) -> int:
        """How many requests of a length go through the model together."""
        if self.batch_size != "auto":
            return self.batch_size
        fit = max(1, (4096 if self._device.type == "cpu" else 65536) // length)
        return min(fit, self.max_batch_size or fit)

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """For ((context, continuation) or None, ids of the context, ids of the continuation) each: the logarithm of
        the continuation's probability, and whether it is the likeliest at each token. ValueError for a continuation of
        no tokens, or of more than max_length."""
        rows = []
        for texts, context, continuation in requests:
            if not continuation:
                raise ValueError(
                    f"the continuation {texts[1]!r} has no tokens of its own behind {texts[0][-40:]!r}: it is empty, "
                    "or the tokenizer joins both"
                )
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens does not fit into max_length {self.max_length}: "
                    "give a larger one in --model_args"
                )
            # Of a context of spaces alone nothing is left, as of an empty one
            rows.append(((context or [self.prefix_token_id]) + continuation)[-self.max_length - 1 :])
        found = [None] * len(rows)
        for part in self.batches([(len(ids) - 1,) for ids in rows], "loglikelihood", disable_tqdm):
            scored = np.array([len(requests[i][2]) for i in part])
            nll, hits = score_tokens(self.model, np.array([rows[i] for i in part]), scored, self.dtype)
            ends = scored.cumsum()[:-1]
            for i, own, right in zip(part, np.split(nll, ends), np.split(hits, ends)):
                found[i] = -own.sum().item(), bool(right.all())
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The logarithm of each text's probability behind an end of text. It is scored in consecutive windows of
        max_length tokens, of which the last one reaches back so far that it has as many."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(number)
        found = np.zeros(len(requests))
        np.add.at(found, owner, [value for value, _ in self._loglikelihood_tokens(windows, disable_tqdm)])
        for request, value in zip(requests, found.tolist()):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A text for each (context, generation_kwargs), up to the first stop text or end of text. The context keeps its
        last max_length - max_gen_toks tokens. ValueError for an empty context, and where nothing of it would be left.
        """
        prompts, wishes = [], []
        for request in requests:
            context, asked = request.args
            wish = Generation.of(asked)
            room = self.max_length - wish.tokens
            if not context:
                raise ValueError(
                    f"task {request.task_name} wants generation from an empty context, behind which there is nothing "
                    "to generate from: give its documents a doc_to_text that is not empty"
                )
            if room < 1:
                raise ValueError(
                    f"task {request.task_name} generates up to {wish.tokens} tokens, which leave no context in a "
                    f"max_length of {self.max_length}: give --gen_kwargs max_gen_toks=N, or a larger max_length"
                )
            prompts.append(self.tok_encode(context)[-room:])
            wishes.append(wish)
        texts = [""] * len(requests)
        keys = [(len(prompt), repr(wish)) for prompt, wish in zip(prompts, wishes)]
        for part in self.batches(keys, "generate_until", disable_tqdm):
            for i, text in zip(part, self.generated([prompts[i] for i in part], wishes[part[0]])):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def generated(self, prompts: list[list[int]], wish: Generation) -> list[str]:
        """A text behind each prompt, all of one length. Those of a batch that end first do not depend on the others."""
        start, eot = len(prompts[0]), self.tokenizer.eot
        # A stop text ends in the newest token and has at most as many tokens as bytes
        reach = max((len(text.encode()) for text in wish.until), default=1)
        going = dict.fromkeys(range(len(prompts)))

        def all_ended(idx: torch.Tensor) -> bool:
            for row, ids in enumerate(idx[:, max(start, idx.size(1) - reach) :].tolist()):
                if row in going and (ids[-1] == eot or any(text in self.tokenizer.decode(ids) for text in wish.until)):
                    del going[row]
            return not going

        idx = torch.tensor(prompts, device=self._device)  # (B, T)
        with autocast(self._device, self.dtype):
            out = self.model.generate(idx, wish.tokens, wish.temperature, wish.top_k, until=all_ended)
        texts = []
        for ids in out[:, start:].tolist():
            ids = ids[: ids.index(eot)] if eot in ids else ids
            texts.append(postprocess_generated_text(self.tokenizer.decode(ids), [*wish.until], None))
        return texts


def count_of(name: str, value: int | str) -> int:
    """A number of at least 1. ValueError for anything else."""
    if not (str(value).isdecimal() and int(value) >= 1):
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    return int(value)
