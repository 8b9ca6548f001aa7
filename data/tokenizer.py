"""Text to token ids and back: bytes, GPT-2's byte-pair encoding from the vocabulary file beside this one, and tiktoken's others."""

import functools
import hashlib
import importlib.metadata
import lzma
import re
from pathlib import Path
from unittest import mock

import numpy as np

from data.shards import DataError, unknown

VOCABULARY = Path(__file__).with_name("vocab.bpe.xz")
VOCABULARY_SHA256 = (
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # unpacked; tiktoken checks the same
)
PIECE = 2**18  # characters; a longer text is encoded in pieces
# Before a single space between other characters every one of the patterns begins a new word, whatever surrounds them.
SAFE_CUT = re.compile(r"(?<=\S) (?=\S)")
# How GPT-2's files write bytes, in the order of its first 256 ids: the printable ones as themselves, the others as chr(256), ….
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_CHARACTERS = {b: chr(b) for b in _PRINTABLE} | {
    b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}
# GPT-2's pattern, in the form that tiktoken found to be equivalent and faster.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def well_formed(text):
    """`text` with surrogate pairs joined and lone surrogates (JSON can hold them) made U+FFFD, so that it has a UTF-8 form."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pieces(text):
    """Cut a long text where that changes no token: a list of strings that together are `text`."""
    parts, start = [], 0
    while len(text) - start > PIECE and (cut := SAFE_CUT.search(text, start + PIECE)):
        parts.append(text[start : cut.start()])
        start = cut.start()
    return [*parts, text[start:]]


class Tokenizer:
    """Ids stand for the byte strings `tokens`, and for no text where these are empty or end; the id `eot` ends a document.

    sha256: identity of the vocabulary, the same on every machine; version: of the library that encodes; n_vocab: one
    more than the highest id; dtype: the smallest that holds every id; token_bytes: (n_vocab,) int64, bytes of text of
    each token; bytes_per_token: typical of English, for estimates.
    """

    def __init__(self, name, tokens, to_ids, pattern, bytes_per_token, version=None, eot=None, n_vocab=None):
        self.name, self.tokens, self.bytes_per_token, self.version = name, tokens, bytes_per_token, version
        self.eot = len(tokens) if eot is None else eot
        self.n_vocab = n_vocab or self.eot + 1
        self.dtype = np.dtype(np.uint16 if self.n_vocab <= 2**16 else np.uint32)
        self.token_bytes = np.zeros(self.n_vocab, np.int64)
        self.token_bytes[: len(tokens)] = [len(t) for t in tokens]
        self._to_ids = to_ids
        digest = hashlib.sha256(f"{pattern}\0<|endoftext|>={self.eot}\0".encode())
        for token in tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        self.sha256 = digest.hexdigest()

    def encode(self, text):
        """Ids of `text`: (n,) of `dtype`. A special token's name inside text is text; lone surrogates become U+FFFD.

        DataError where tiktoken gives up, as it does on about a million white-space characters in a row.
        """
        parts = [self.encode_piece(piece) for piece in pieces(well_formed(text))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_piece(self, text):
        """`encode` for a well-formed text of moderate size, in one go."""
        try:
            return self._to_ids(text).astype(self.dtype)
        except ValueError as error:
            raise DataError(f"tokenizer {self.name} cannot encode this text: {error}") from None

    def decode(self, ids):
        """Text of `ids`; broken UTF-8 becomes U+FFFD. Special tokens, `eot` among them, and padding ids decode to nothing."""
        ids = np.asarray(ids).ravel().tolist()
        return b"".join(self.tokens[i] for i in ids if i < len(self.tokens)).decode(errors="replace")


def _byte():
    return Tokenizer(
        "byte", [bytes([b]) for b in range(256)], lambda text: np.frombuffer(text.encode(), np.uint8), "", 1.0
    )


def _from_encoding(encoding, tokens, pattern, bytes_per_token):
    """The Tokenizer of a tiktoken.Encoding that has an end-of-text token."""
    return Tokenizer(
        encoding.name,
        tokens,
        lambda text: encoding.encode_to_numpy(text, disallowed_special=()),
        pattern,
        bytes_per_token,
        f"tiktoken {importlib.metadata.version('tiktoken')}",
        encoding.eot_token,
        encoding.n_vocab,
    )


def _gpt2():
    import tiktoken

    try:
        merges = lzma.decompress(VOCABULARY.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise DataError(
            f"GPT-2's vocabulary {VOCABULARY} cannot be read ({error}); restore it: git checkout data"
        ) from None
    if hashlib.sha256(merges).hexdigest() != VOCABULARY_SHA256:
        raise DataError(f"GPT-2's vocabulary {VOCABULARY} is not the published one; restore it: git checkout data")
    byte_of = {character: b for b, character in BYTE_CHARACTERS.items()}
    tokens = [bytes([b]) for b in BYTE_CHARACTERS]
    for line in merges.decode().splitlines()[1:]:  # after the version: one merge a line, in order of rank
        tokens.append(bytes(byte_of[c] for c in line if c != " "))
    encoding = tiktoken.Encoding(
        "gpt2",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={t: i for i, t in enumerate(tokens)},
        special_tokens={"<|endoftext|>": len(tokens)},
        explicit_n_vocab=50257,
    )
    return _from_encoding(encoding, tokens, GPT2_PATTERN, 4.3)


def _tiktoken(name):
    """An encoding of tiktoken's registry, from a vocabulary file beside this one, else from tiktoken's cache or the network."""
    import tiktoken.load
    import tiktoken.registry

    read = tiktoken.load.read_file_cached

    def read_checked(url, expected_hash=None):
        path = VOCABULARY.with_name(url.rsplit("/", 1)[-1])
        advice = f"put {url} at {path}" + (f" (its sha256 is {expected_hash})" if expected_hash else "")
        if path.is_file():
            content = path.read_bytes()
            if expected_hash and hashlib.sha256(content).hexdigest() != expected_hash:
                raise DataError(f"{path} is not the vocabulary of {name}; {advice}")
            return content
        try:
            return read(url, expected_hash)
        except Exception as error:  # of the network: requests' own, or OSError, or ValueError for a wrong hash
            raise DataError(
                f"the vocabulary of tokenizer {name} cannot be downloaded ({type(error).__name__}); {advice}"
            ) from None

    with mock.patch(
        "tiktoken.load.read_file_cached", read_checked
    ):  # get_encoding has no other way to say where files are
        encoding = tiktoken.registry.get_encoding(name)
    ranks = encoding._mergeable_ranks
    tokens = [b""] * (max(ranks.values()) + 1)
    for token, rank in ranks.items():
        tokens[rank] = token
    return _from_encoding(encoding, tokens, encoding._pat_str, 4.5)


TOKENIZERS = {"byte": _byte, "gpt2": _gpt2}


def tokenizer_names():
    """Every name that load_tokenizer knows."""
    import tiktoken

    return [*TOKENIZERS, *(name for name in sorted(tiktoken.list_encoding_names()) if name not in TOKENIZERS)]


@functools.cache
def load_tokenizer(name):
    """The Tokenizer called `name`; DataError for an unknown name.

    byte and gpt2 never go to the network; tiktoken's other encodings do where their vocabulary is not at hand.
    """
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    if name not in tokenizer_names():
        raise unknown("tokenizer", name, tokenizer_names())
    return _tiktoken(name)
