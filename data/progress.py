"""What data/prepare.py says on stderr while it works: notes, and a progress bar."""

import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm


def note(message: str) -> None:
    """Print a note, without disturbing the bar."""
    tqdm.write(f"note: {message}", file=sys.stderr)


class Progress:
    """The bar: MB/s of text and time left, with documents, tokens, tokens/s and the free disk space."""

    def __init__(self, folder: Path, expected_bytes: int | None):
        self.folder, self.start, self.documents, self.tokens, self.new_tokens = folder, time.monotonic(), 0, 0, 0
        self.bar = tqdm(
            desc="tokenizing",
            total=expected_bytes,
            unit="B",
            unit_scale=True,
            mininterval=1 if sys.stderr.isatty() else 30,
        )

    def __call__(self, documents: int, tokens: int, n_bytes: int, found: bool = False) -> None:
        """Count more of each. `found`: an earlier run made it, so it does not count for the speed."""
        self.documents, self.tokens = self.documents + documents, self.tokens + tokens
        if found:
            self.bar.initial += n_bytes
            self.bar.n += n_bytes
            return
        self.new_tokens += tokens
        if time.monotonic() - self.bar.last_print_t >= self.bar.mininterval:
            rate = self.new_tokens / (time.monotonic() - self.start)
            self.bar.set_postfix_str(
                f"{self.documents:,} documents, {self.tokens:,} tokens, {rate:,.0f} tokens/s, "
                f"{shutil.disk_usage(self.folder).free / 1e9:.0f} GB free",
                refresh=False,
            )
        self.bar.update(n_bytes)
