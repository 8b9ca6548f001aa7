"""A tokenizer of data/ as one of the transformers library, and whether it is the same."""

import random
import re
from pathlib import Path

from data.tokenizer import BYTE_CHARACTERS, Tokenizer

END = "<|endoftext|>"
# Texts at which tokenizers differ
ODD = [
    END,
    f"a{END} b<|endofprompt|>",
    "",
    " ",
    "  x \n\n \t\r\n  y  \n ",
    "trailing   ",
    "\n" * 9 + " " * 30 + "x",
    "don't DON'T we'LL I'Ve 'S 's'ſ it’s",
    "1 12 123 1234567890 3.14e-10 ٣٤٥ ½² ５６",
    "HTTPServer iPhone ǅ ĲŉﬁẞİıΣς",
    "def f(x):\n    return x ** 2  # ok\n\n\nclass A: pass",
    '/usr/bin//x-y_z?q=1&r=[2]{3}\\"`~ -- … —',
    "日本語、中文 한국어 हिन्दी ไทย العربية",
    "e\u0301 \ufeff \x00 \x85 \u2028 \u200d \xa0a\u3000b \u200b c",
    "😀👍🏽👨‍👩‍👧 🇩🇪",
]


def tokenizer_of(ours: Tokenizer):
    """A tokenizer of data/ as one of transformers."""
    import transformers
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    def text(token: bytes) -> str:
        return "".join(BYTE_CHARACTERS[b] for b in token)

    vocabulary = {text(token): i for i, token in enumerate(ours.tokens) if token} | {END: ours.eot}
    merges, steps = [], [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if ours.pattern:
        # tiktoken merges the pair that makes the lowest id, wherever in a token it is cut
        ranks = {token: i for i, token in enumerate(ours.tokens) if token}
        for token in ranks:
            cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
            cuts = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
            merges += [(text(a), text(b)) for a, b in sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))]
        # In Oniguruma's syntax {1,3}+ repeats {1,3}, and $ ends a line. Backtracking finds the same words
        pattern = re.sub(r"([?+*}])\+", r"\1", ours.pattern).replace("$", r"\z")
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    # A word that is a token is that token, as in tiktoken; without a pattern the word is the text, which may be END
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=bool(ours.pattern)))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, split_special_tokens=True
    )


def check_tokenizer(folder: Path, ours: Tokenizer) -> None:
    """ValueError unless the tokenizer in the folder gives texts the ids that ours gives them, and ids their texts."""
    import transformers

    written = transformers.AutoTokenizer.from_pretrained(folder)
    words = random.Random(0).choices([i for i, token in enumerate(ours.tokens) if token], k=20_000)
    texts = ODD + [ours.decode(words[i : i + 100]) for i in range(0, len(words), 100)]
    for text in texts:
        ids = ours.encode(text).tolist()
        if written(text)["input_ids"] != ids or written.decode(ids) != text:
            raise ValueError(
                f"the tokenizer {ours.name} cannot be exported: that of transformers reads {text[:40]!r} differently"
            )
    if written.eos_token_id != ours.eot:
        raise ValueError(f"the tokenizer {ours.name} cannot be exported: its end-of-text is not {ours.eot} there")
