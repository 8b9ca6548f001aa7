"""Text to token ids and back: bytes, or GPT-2's byte-pair encoding built from the vocabulary file beside this one."""
import functools
import hashlib
import lzma
from pathlib import Path

import numpy as np

from data.shards import DataError, unknown

VOCABULARY = Path(__file__).with_name("vocab.bpe.xz")
VOCABULARY_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # unpacked; tiktoken checks the same
# GPT-2's pattern, in the form that tiktoken found to be equivalent and faster.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def well_formed(text):
    """`text` with surrogate pairs joined and lone surrogates (JSON can hold them) made U+FFFD, so that it has a UTF-8 form."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """Ids 0 … n_vocab-2 stand for the byte strings `tokens`; the last id, `eot`, ends a document and stands for no text.

    sha256: identity of the vocabulary, the same on every machine; dtype: the smallest that holds every id;
    token_bytes: (n_vocab,) int64, bytes of text of each token; bytes_per_token: typical of English, for estimates.
    """

    def __init__(self, name, tokens, to_ids, pattern, bytes_per_token):
        self.name, self.tokens, self.bytes_per_token = name, tokens, bytes_per_token
        self.n_vocab, self.eot = len(tokens) + 1, len(tokens)
        self.dtype = np.dtype(np.uint16 if self.n_vocab <= 2**16 else np.uint32)
        self.token_bytes = np.array([len(t) for t in tokens] + [0], np.int64)
        self._to_ids = to_ids
        digest = hashlib.sha256(f"{pattern}\0<|endoftext|>={self.eot}\0".encode())
        for token in tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        self.sha256 = digest.hexdigest()

    def encode(self, text):
        """Ids of `text`: (n,) of `dtype`. A special token's name inside text is text; lone surrogates become U+FFFD.

        DataError where tiktoken gives up, as it does on about a million white-space characters in a row.
        """
        try:
            return self._to_ids(well_formed(text)).astype(self.dtype)
        except ValueError as error:
            raise DataError(f"tokenizer {self.name} cannot encode this text: {error}") from None

    def decode(self, ids):
        """Text of `ids`; broken UTF-8 becomes U+FFFD. `eot`, and padding ids above it, decode to nothing."""
        return b"".join(self.tokens[i] for i in np.asarray(ids).ravel().tolist() if i < self.eot).decode(errors="replace")


def _byte():
    return Tokenizer("byte", [bytes([b]) for b in range(256)], lambda text: np.frombuffer(text.encode(), np.uint8), "", 1.0)


def _gpt2():
    import tiktoken

    try:
        merges = lzma.decompress(VOCABULARY.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise DataError(f"GPT-2's vocabulary {VOCABULARY} cannot be read ({error}); restore it: git checkout data") from None
    if hashlib.sha256(merges).hexdigest() != VOCABULARY_SHA256:
        raise DataError(f"GPT-2's vocabulary {VOCABULARY} is not the published one; restore it: git checkout data")
    # The file writes bytes as characters: the printable ones as themselves, which come first, the others as chr(256), ….
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokens = [bytes([b]) for b in printable + others]
    for line in merges.decode().splitlines()[1:]:  # after the version: one merge a line, in order of rank
        tokens.append(bytes(byte_of[c] for c in line if c != " "))
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks={t: i for i, t in enumerate(tokens)},
                                 special_tokens={"<|endoftext|>": len(tokens)}, explicit_n_vocab=50257)
    return Tokenizer("gpt2", tokens, lambda text: encoding.encode_to_numpy(text, disallowed_special=()), GPT2_PATTERN, 4.3)


TOKENIZERS = {"byte": _byte, "gpt2": _gpt2}


@functools.cache
def load_tokenizer(name):
    """The Tokenizer called `name` (one of TOKENIZERS), without the network. DataError for an unknown name."""
    if name not in TOKENIZERS:
        raise unknown("tokenizer", name, list(TOKENIZERS))
    return TOKENIZERS[name]()
