"""Text to tokens to windows: the corpora, the tokenizers, the shards on disk and the order in which training reads them."""
