"""The embedding job: turns images or captions into a store, resumable and in many processes."""

from xbt.embedding.job import EmbedConfig, embed, embed_texts_into_store

__all__ = ["EmbedConfig", "embed", "embed_texts_into_store"]
