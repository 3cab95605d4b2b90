"""The settings of a backfill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xbt.data import CaptionSource, PairSource
from xbt.data.image_collection import ImageCollection
from xbt.errors import ConfigError

MAY_CHANGE = (
    "batch_size", "num_workers", "compile", "items_per_second", "max_items", "max_hours", "recall_target",
    "stop_when_flat", "store",
)  # fmt: skip
"""Settings that may change when a job is continued: none of them changes which item comes next."""


@dataclass
class BackfillConfig:
    """Backfill an index with a new encoder: the most urgent items first, until it is done or pays no more.

    The index serves meanwhile. The output directory gets the order (``order.json``), recall over the
    fraction backfilled (``curve.jsonl``), the items that could not be embedded (``rejected.jsonl``) and
    ``result.json``. The merge of both sides is written to ``merge.json``: in the gallery, or for a database
    in the output directory.
    """

    gallery: str
    """The gallery's directory, or qdrant://HOST:PORT/COLLECTION."""
    encoder: str
    """The new encoder, such as transformers:openai/clip-vit-large-patch14."""
    images: ImageCollection
    """The images of the gallery's items, under the same ids. They must be readable in any order: no
    streams, and no tars that are compressed or on another machine."""
    output_dir: str
    """Directory for the job's own files; with several machines, on a file system that all of them share."""
    store: str | None = None
    """A store, or a folder that clip-retrieval wrote, to make the gallery from if there is none yet."""
    old: str | None = None
    """The encoder that embedded the gallery. It makes the queries for the items not yet backfilled,
    unless compatible is given, and embeds the images of --support."""
    compatible: str | None = None
    """A compatible encoder, which makes the queries for the items not yet backfilled with the new model."""
    order: Literal["random", "oldest", "query_log", "distance_to_mean", "fastfill", "rehearsed"] = "random"
    """Items that come first: any; the oldest; those that a log's queries find most often; those farthest from
    their cluster's mean; those for which a map from old to new is least certain (needs support); those that
    gained most in a rehearsal on pairs (needs support; it compares all items with each other, which takes
    minutes for a hundred thousand items and hours for a million)."""
    support: PairSource | None = None
    """Image-text pairs to learn the order and the merge from; none of them may be in evaluation."""
    evaluation: PairSource | None = None
    """Pairs whose images are in the gallery, and whose captions measure recall during the job."""
    query_log: CaptionSource | None = None
    """Queries as users ask them, for the orders query_log and rehearsed."""
    clusters: int = 20
    """Clusters of the order distance_to_mean."""
    max_items: int | None = None
    """Stop after this many items of the order, including those of earlier runs."""
    max_hours: float | None = None
    """Stop after this many hours of this run."""
    recall_target: float | None = None
    """Stop once the mean of R@1, R@5 and R@10 reaches this fraction."""
    stop_when_flat: bool = False
    """Stop once the last thousand items have gained no more than the standard error of that gain."""
    items_per_second: float | None = None
    """Embed no faster than this, all processes together, to leave capacity for other work."""
    evaluate_every: int = 1000
    """Items between two measurements of recall."""
    commit_every: int = 1000
    """Items per write to the gallery; a kill loses at most so many."""
    batch_size: int = 256
    """Images per forward pass."""
    num_workers: int | None = None
    """Processes that decode images, for each process that embeds; by default chosen by the cores."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass."""
    compile: bool = False
    """Compile the towers with torch.compile: slower to start, faster for millions of items on a GPU."""
    seed: int = 0
    """Seeds the order and the merge."""
    overwrite: bool = False
    """Draw a new order and begin a new curve in an output directory of another job. Items that are
    backfilled stay so."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If one is out of range, or another setting that it needs is missing.
        """
        for name in ("evaluate_every", "commit_every", "batch_size", "clusters", "max_items"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}")
        for name in ("max_hours", "items_per_second", "recall_target"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name} must be above 0, got {value}")
        if self.num_workers is not None and self.num_workers < 0:
            raise ConfigError(f"--num_workers must be at least 0, got {self.num_workers}")
        if self.recall_target is not None and self.recall_target > 1:
            raise ConfigError(f"--recall_target is a fraction such as 0.6, got {self.recall_target}")
        self._check_needs()

    def _check_needs(self) -> None:
        makes_queries = self.old is not None or self.compatible is not None
        if self.query_log is not None and self.order not in ("query_log", "rehearsed"):
            raise ConfigError(
                f"--query_log is for the orders query_log and rehearsed, and --order is {self.order}; leave "
                "it out"
            )
        needs = {
            "--evaluation": (self.evaluation, "--old or --compatible", makes_queries),
            "--recall_target": (self.recall_target, "--evaluation", self.evaluation),
            "--stop_when_flat": (self.stop_when_flat, "--evaluation", self.evaluation),
            "--order query_log": (self.order == "query_log", "--query_log", self.query_log),
            "--query_log": (self.query_log, "--old or --compatible", makes_queries),
            "--order fastfill": (self.order == "fastfill", "--support", self.support),
            "--order rehearsed": (self.order == "rehearsed", "--support", self.support),
            "--support": (self.support, "--old or --compatible", makes_queries),
        }
        for name, (given, needed, there) in needs.items():
            if given and not there:
                raise ConfigError(f"{name} needs {needed} as well; give it, or leave {name} out")
