"""Text to token ids and back: bytes, GPT-2's byte-pair encoding (its vocabulary is in this folder), and tiktoken's."""

import base64
import functools
import hashlib
import importlib.metadata
import lzma
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.shards import DataError, unknown

VOCABULARY = Path(__file__).with_name("vocab.bpe.xz")
VOCABULARY_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # unpacked, as in tiktoken
PIECE = 2**18  # characters; a longer text is encoded in pieces
# Each of the patterns begins a new word before a single space between other characters, whatever surrounds them.
SAFE_CUT = re.compile(r"(?<=\S) (?=\S)")
# How GPT-2's files write bytes, in the order of its first 256 ids: printable ones as themselves, others as chr(256), ….
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_CHARACTERS = {b: chr(b) for b in _PRINTABLE} | {
    b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}
# GPT-2's pattern, in the form that tiktoken found to be equivalent and faster.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@dataclass(frozen=True)
class Published:
    """A byte-pair encoding that OpenAI published for tiktoken."""

    file: str
    sha256: str  # of the file
    pattern: str  # that cuts text into words, as in tiktoken 0.14
    eot: int  # id of end-of-text
    n_vocab: int  # highest id + 1, special tokens included


URL = "https://openaipublic.blob.core.windows.net/encodings/"
P50K = ("p50k_base.tiktoken", "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069", GPT2_PATTERN)
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
O200K_PATTERN = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ]
)
O200K = (
    "o200k_base.tiktoken",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    O200K_PATTERN,
    199999,
)
PUBLISHED = {
    "cl100k_base": Published(
        "cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        CL100K_PATTERN,
        100257,
        100277,
    ),
    "o200k_base": Published(*O200K, n_vocab=200019),
    "o200k_harmony": Published(*O200K, n_vocab=201088),
    "p50k_base": Published(*P50K, eot=50256, n_vocab=50281),
    "p50k_edit": Published(*P50K, eot=50256, n_vocab=50284),
    "r50k_base": Published(
        "r50k_base.tiktoken",
        "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        GPT2_PATTERN,
        50256,
        50257,
    ),
}


def well_formed(text: str) -> str:
    """`text` as UTF-8 can hold it: surrogate pairs are joined, lone surrogates (JSON can hold them) are U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pieces(text: str, size: int = PIECE) -> list[str]:
    """Cut a text of more than `size` characters where that changes no token. The pieces together are `text`."""
    parts, start = [], 0
    while len(text) - start > size and (cut := SAFE_CUT.search(text, start + size)):
        parts.append(text[start : cut.start()])
        start = cut.start()
    return [*parts, text[start:]]


# The alphabet of the tokenizer `characters`: printable ASCII, then letters of the Latin script. 511 of them
CHARACTERS = "".join(map(chr, [*range(0x21, 0x7F), *range(0xC0, 0xD7), *range(0xD8, 0xF7), *range(0xF8, 0x263)]))


class Tokenizer:
    """A vocabulary and its encoder.

    tokens: the byte string of each id; empty for ids that stand for no text
    pattern: cuts text into words, within which tokens are merged; empty where no tokens are
    eot: id that ends a document; n_vocab: the highest id + 1
    sha256: hex, of the vocabulary, the same on every machine; version: of the library that encodes
    dtype: the smallest that holds every id; token_bytes: (n_vocab,) int64, bytes of text of each token
    bytes_per_token: typical of English, for estimates
    """

    def __init__(
        self,
        name: str,
        tokens: list[bytes],
        to_ids: Callable[[str], np.ndarray],
        pattern: str,
        bytes_per_token: float,
        version: str | None = None,
        eot: int | None = None,
        n_vocab: int | None = None,
    ):
        self.name, self.tokens, self.pattern = name, tokens, pattern
        self.bytes_per_token, self.version = bytes_per_token, version
        self.eot = len(tokens) if eot is None else eot
        self.n_vocab = n_vocab or self.eot + 1
        self.dtype = np.dtype(np.uint16 if self.n_vocab <= 2**16 else np.uint32)
        self.token_bytes = np.zeros(self.n_vocab, np.int64)
        self.token_bytes[: len(tokens)] = [len(t) for t in tokens]
        self._to_ids = to_ids
        vocabulary = b"".join([len(token).to_bytes(4, "little") + token for token in tokens])
        self.sha256 = hashlib.sha256(f"{pattern}\0<|endoftext|>={self.eot}\0".encode() + vocabulary).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`: (n,) of `dtype`. A special token's name inside text is text. Lone surrogates become U+FFFD.

        DataError where tiktoken gives up, as it does on about a million white-space characters in a row.
        """
        parts = [self.encode_piece(piece) for piece in pieces(well_formed(text))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_piece(self, text: str) -> np.ndarray:
        """`encode` for a well-formed text of moderate size, in one go."""
        try:
            return self._to_ids(text).astype(self.dtype)
        except ValueError as error:
            raise DataError(f"tokenizer {self.name} cannot encode this text: {error}") from None

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """Text of `ids`. Broken UTF-8 becomes U+FFFD. Special tokens (`eot` too) and padding ids decode to nothing."""
        ids = np.asarray(ids).ravel().tolist()
        return b"".join(self.tokens[i] for i in ids if i < len(self.tokens)).decode(errors="replace")


def byte_tokenizer() -> Tokenizer:
    """A token is a byte of UTF-8. End-of-text is 256."""
    tokens = [bytes([b]) for b in range(256)]
    return Tokenizer("byte", tokens, lambda text: np.frombuffer(text.encode(), np.uint8), "", 1.0)


def characters_tokenizer() -> Tokenizer:
    """A token is a character of CHARACTERS, for the tasks of data/tasks.py. End-of-text is 511."""
    ids = np.full(ord(CHARACTERS[-1]) + 1, -1)
    ids[[*map(ord, CHARACTERS)]] = np.arange(len(CHARACTERS))

    def to_ids(text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        found = ids[np.minimum(codes, len(ids) - 1)]
        if (strange := (codes >= len(ids)) | (found < 0)).any():
            raise ValueError(f"{chr(codes[np.argmax(strange)])!r} is not in its alphabet")
        return found

    return Tokenizer("characters", [character.encode() for character in CHARACTERS], to_ids, "", 1.0)


def gpt2_tokenizer(vocabulary: Path = VOCABULARY) -> Tokenizer:
    """GPT-2's tokenizer, from its packed file of merges. DataError where the file is damaged."""
    try:
        merges = lzma.decompress(vocabulary.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise DataError(
            f"GPT-2's vocabulary {vocabulary} cannot be read ({error}); restore it: git checkout data"
        ) from None
    if hashlib.sha256(merges).hexdigest() != VOCABULARY_SHA256:
        raise DataError(f"GPT-2's vocabulary {vocabulary} is not the published one; restore it: git checkout data")
    byte_of = {character: b for b, character in BYTE_CHARACTERS.items()}
    tokens = [bytes([b]) for b in BYTE_CHARACTERS]
    for line in merges.decode().splitlines()[1:]:  # after the version: one merge a line, in order of rank
        tokens.append(bytes(map(byte_of.__getitem__, line.replace(" ", ""))))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return _byte_pair_tokenizer("gpt2", ranks, GPT2_PATTERN, len(tokens), len(tokens) + 1, 4.3)


def published_tokenizer(name: str, folder: Path = VOCABULARY.parent) -> Tokenizer:
    """A tokenizer of PUBLISHED. Its vocabulary file comes from `folder`, or else from tiktoken's cache or the network.

    DataError, saying which file to put where, if it cannot be had.
    """
    import tiktoken.load

    row = PUBLISHED[name]
    path, url = folder / row.file, URL + row.file
    advice = f"put {url} at {path} (its sha256 is {row.sha256})"
    if path.is_file():
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != row.sha256:
            raise DataError(f"{path} is not the vocabulary of {name}; {advice}")
    else:
        try:
            content = tiktoken.load.read_file_cached(url, row.sha256)
        except Exception as error:  # of the network: requests' own, or OSError, or ValueError for a wrong hash
            raise DataError(
                f"the vocabulary of tokenizer {name} cannot be downloaded ({type(error).__name__}); {advice}"
            ) from None
    lines = [line.split() for line in content.splitlines() if line]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return _byte_pair_tokenizer(name, ranks, row.pattern, row.eot, row.n_vocab, 4.5)


def _byte_pair_tokenizer(
    name: str, ranks: dict[bytes, int], pattern: str, eot: int, n_vocab: int, bytes_per_token: float
) -> Tokenizer:
    import tiktoken

    special = {"<|endoftext|>": eot}  # other special tokens need no name: in text, all of them are text
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    tokens = [b""] * (max(ranks.values()) + 1)
    for token, rank in ranks.items():
        tokens[rank] = token

    def to_ids(text: str) -> np.ndarray:
        return encoding.encode_to_numpy(text, disallowed_special=())

    version = f"tiktoken {importlib.metadata.version('tiktoken')}"
    return Tokenizer(name, tokens, to_ids, pattern, bytes_per_token, version, eot, n_vocab)


TOKENIZERS = {"byte": byte_tokenizer, "gpt2": gpt2_tokenizer, "characters": characters_tokenizer} | {
    name: functools.partial(published_tokenizer, name) for name in PUBLISHED
}


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`. DataError for an unknown name.

    byte and gpt2 never go to the network. The others do where their vocabulary is not at hand.
    """
    if name not in TOKENIZERS:
        raise unknown("tokenizer", name, TOKENIZERS)
    return TOKENIZERS[name]()
