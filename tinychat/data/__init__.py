"""Text in, batches out: records, the embedded corpus, public sources, shards and the mix."""

from functools import cache
from importlib.resources import files


@cache
def tokenizer_model() -> bytes:
    """Return the shipped tokenizer: a SentencePiece model of 8,192 pieces."""
    return files("tinychat.data").joinpath("tokenizer.model").read_bytes()
