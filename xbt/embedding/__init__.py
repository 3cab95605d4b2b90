"""The job that turns data into a store, fast and resumable."""

from xbt.embedding.job import EmbedConfig, embed, embed_texts_into_store

__all__ = ["EmbedConfig", "embed", "embed_texts_into_store"]
