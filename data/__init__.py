"""From text to token shards: corpora, tokenizers, and the data folders that training and evaluation read."""
