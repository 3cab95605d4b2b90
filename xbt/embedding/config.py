"""The settings of an embedding job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xbt.data.captions import CaptionSource
from xbt.data.image_collection import ImageCollection, open_captions, open_images
from xbt.data.items import ItemSource
from xbt.embedding.retry import refuse_streams
from xbt.errors import ConfigError

MAY_CHANGE = ("batch_size", "num_workers", "compile", "retry_rejected", "max_rejected")
"""Settings that may be others when a job is continued: they change at most the last digits of a vector, or
what is done about rejected items."""


@dataclass
class EmbedConfig:
    """Embed images or captions into a store, with any number of processes; a killed job continues.

    The output directory is the store (open it with ``xbt.EmbeddingStore.open``), with ``rejected.jsonl``
    (what could not be embedded, and why) and ``notes.jsonl`` (what was converted or dropped to embed it)
    beside it.
    """

    encoder: str
    """The encoder, such as open_clip:ViT-B-32-quickgelu/openai."""
    output_dir: str
    """Where the store goes; with several machines, on a file system that all of them see."""
    images: ImageCollection | None = None
    """The images to embed, or ..."""
    captions: CaptionSource | None = None
    """... the captions; WebDataset tars will do here as well."""
    shard_size: int = 10_000
    """Items per shard of the store, at most: what a killed job loses per process. Of a list that several
    processes share, so many fewer that all of them have equal shares, but not below 256."""
    batch_size: int = 256
    """Items per forward pass. It may change when a job is continued."""
    num_workers: int | None = None
    """Processes that decode images or tokenise texts, for each process that embeds; chosen by the cores where
    it is left out."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the vectors on disk."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward pass."""
    compile: bool = False
    """Compile the towers with torch.compile: slower to start, faster for millions of items on a GPU."""
    retry_rejected: bool = False
    """Try again what was rejected, also of a finished job: images may have been unreadable for a while. What
    can be embedded now is appended to the store. Not with streams."""
    max_rejected: float | None = None
    """Stop when more than this share of at least 100 items was rejected; what is done is kept."""
    overwrite: bool = False
    """Start afresh in an output directory that holds another job."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: If both or neither of ``images`` and ``captions`` are given, or a number is too
                small.
        """
        if (self.images is None) == (self.captions is None):
            given = "both were" if self.images is not None else "neither was"
            raise ConfigError(
                f"give either --images.source or --captions.source: {given} given, and a store holds one of "
                "them"
            )
        for name, least in (("shard_size", 1), ("batch_size", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name} must be at least {least}, got {value}")
        if self.max_rejected is not None and not 0 <= self.max_rejected < 1:
            raise ConfigError(f"--max_rejected is a share from 0 to below 1, got {self.max_rejected}")

    def open_source(self) -> ItemSource:
        """Opens the images or captions; nothing is decoded yet.

        Raises:
            DataError: If they cannot be used.
            ConfigError: If what was rejected of streams is to be tried again.
        """
        if self.images is not None:
            source = open_images(self.images)
        else:
            assert self.captions is not None
            source = open_captions(self.captions)
        if self.retry_rejected:
            refuse_streams(source)
        return source
