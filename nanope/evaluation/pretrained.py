"""Causal language models of the transformers library, with the few methods that an evaluation needs of a GPT."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from data.shards import Data
from data.tokenizer import load_tokenizer
from nanope.errors import first_line
from nanope.evaluation.protocols import split_of


@dataclass
class Shape:
    block_size: int
    pos: str


class Pretrained(nn.Module):
    """A transformers causal LM from a local folder or a hub name, as transformers loads it, in float32.

    hidden(idx) (B, T) → (B, T, C) and lm_head.weight (V, C) give its logits, which is checked on a few tokens.
    OSError where nothing is found, ValueError for a model whose logits are made otherwise, or without transformers.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name, self.net = name, load_net(name)
        self.net.eval().requires_grad_(False)
        self.lm_head = self.net.get_output_embeddings()
        c = self.net.config
        length = getattr(c, "max_position_embeddings", None) or getattr(c, "n_positions", None)
        if not length:
            raise ValueError(f"{name} does not say its training length (max_position_embeddings)")
        self.config = Shape(length, c.model_type)
        self.table = length if self.has_position_table() else None
        self.check_head()

    def has_position_table(self) -> bool:
        modules = self.net.named_modules()
        return any(isinstance(m, nn.Embedding) and ("wpe" in path or "position" in path) for path, m in modules)

    @torch.no_grad()
    def check_head(self) -> None:
        """ValueError unless the logits are the output layer times the last hidden state."""
        idx = torch.arange(8)[None] % self.net.config.vocab_size
        theirs = self.net(input_ids=idx, use_cache=False).logits
        if not torch.allclose(self.hidden(idx) @ self.lm_head.weight.t(), theirs, atol=1e-4):
            raise ValueError(
                f"{self.name}: the logits of {self.config.pos} are not its output layer times its last hidden state; "
                "such models cannot be evaluated here"
            )

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        """Final hidden states (B, T, C) of tokens idx (B, T)."""
        return self.net.base_model(input_ids=idx, use_cache=False).last_hidden_state

    def check_length(self, length: int) -> None:
        """ValueError where the model cannot go to this length."""
        if self.table and length > self.table:
            raise ValueError(
                f"the position table of {self.config.pos} ends at {self.table}: a length of {length} is not possible"
            )

    def scaled(self, rule: str, factor: float):
        raise ValueError("frequency scaling is there for runs of train.py, not for models of transformers")

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def sha256(self) -> str:
        """Identity of the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.net.state_dict().items()):
            digest.update(name.encode() + value.contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def check_tokenizer(self, data: Data, split: str) -> None:
        """ValueError unless the model's own tokenizer makes the data's ids of the data's text."""
        import transformers

        tokens, ours = split_of(data, split), load_tokenizer(data.manifest["tokenizer"]["name"])
        start, size = max(tokens.documents().tolist(), key=lambda document: document[1])
        ids = tokens.read(start, start + min(size, 4096))
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.name)
            theirs = tokenizer(ours.decode(ids), add_special_tokens=False)["input_ids"]
        except Exception as error:
            raise ValueError(
                f"{self.name} has no tokenizer that could be compared with the data's ({ours.name}); save it there: "
                f"{first_line(error)}"
            ) from error
        # Where the text is cut, the last word may encode otherwise
        if not np.array_equal(theirs[: len(ids) - 16], ids[:-16]):
            raise ValueError(
                f"the tokenizer of {self.name} is not that of {data.folder} ({ours.name}): prepare the data with the "
                "model's own"
            )


def load_net(name: str) -> nn.Module:
    """The model as transformers loads it, without its messages."""
    try:
        import transformers
    except ImportError:
        raise ValueError("--model needs the transformers library: pip install -r requirements-dev.txt") from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not Path(name).is_dir() and (Path(name).exists() or name.count("/") > 1 or name.startswith(("/", "."))):
        raise OSError(f"no model folder {name}")
    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        return load(name, dtype=torch.float32, attn_implementation="sdpa")
    except Exception as error:  # of many kinds, most with advice of several lines
        raise OSError(
            f"{name} cannot be loaded as a causal language model of transformers: {first_line(error)}"
        ) from error
