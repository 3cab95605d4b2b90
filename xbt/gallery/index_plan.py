"""Which index a gallery has: any that FAISS's ``index_factory`` can make.

FAISS is imported when the first index is made and not before: torch and faiss-cpu in one process abort on
macOS when both load OpenMP at import.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from xbt.errors import ConfigError

EXACT = "Flat"
"""The index that is none: every row is compared."""
ROWS_PER_CENTROID = 39
"""Below this many rows per centroid FAISS warns that k-means has too few; then rows are searched exactly."""
OPQ_CENTROIDS = 256
"""Centroids of the quantiser with which FAISS learns OPQ's rotation, whatever the codes are."""
COARSE_PROPOSALS = 4
"""Rows that an index of compressed vectors proposes for each one wanted."""


@dataclass(frozen=True)
class IndexPlan:
    """Which index a gallery has.

    Attributes:
        factory: A string of FAISS's ``index_factory``, such as ``"Flat"``, ``"IVF1024,Flat"``,
            ``"HNSW32"`` or ``"IVF4096,PQ64"``.
        tuning: Search parameters as FAISS's ``ParameterSpace`` reads them, such as ``"nprobe=64"`` or
            ``"efSearch=128"``. Empty, an inverted file looks into √n of its n lists, and everything else is
            left as FAISS has it.
    """

    factory: str = EXACT
    tuning: str = ""

    @property
    def exact(self) -> bool:
        """Whether every row is compared."""
        return self.factory == EXACT

    @property
    def proposals(self) -> int:
        """Rows that are proposed for each one wanted: more where codes are coarse and proposals uncertain."""
        return COARSE_PROPOSALS if re.search("PQ|SQ|LSH|RQ|PCA", self.factory) else 1

    def check(self, dim: int) -> None:
        """Refuses what FAISS does not know; for ``"Flat"`` FAISS is not even imported.

        Raises:
            ConfigError: If the string or the tuning cannot be used; the message says what FAISS said.
        """
        if not self.exact:
            self.make(dim)
            if re.search(r"\bIDMap2?\b", self.factory):
                raise ConfigError(
                    f"the index {self.factory!r} numbers its rows itself, but that is what the gallery does; "
                    "leave IDMap out"
                )
        elif self.tuning:
            raise ConfigError(
                f"the tuning {self.tuning!r} is for an approximate index, but the index is {EXACT!r}; leave "
                "it out, or choose an index such as 'IVF1024,Flat'"
            )

    def require_inverted_file(self, dim: int) -> None:
        """Refuses an index that cannot be mapped from disk.

        Raises:
            ConfigError: If it is no inverted file.
        """
        import faiss

        if self.exact or faiss.try_extract_index_ivf(self.make(dim)) is None:
            raise ConfigError(
                f"the index {self.factory!r} cannot be mapped, only inverted files can; leave mmap out, or "
                "make the gallery with an index such as 'IVF1024,Flat'"
            )

    def make(self, dim: int) -> Any:
        """An empty index.

        Raises:
            ConfigError: If the string or the tuning cannot be used.
        """
        import faiss

        try:
            index = faiss.index_factory(dim, self.factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ConfigError(
                f"the index {self.factory!r} cannot be made for dimension {dim} ({_said(error)}); give a "
                "string of FAISS's index_factory, such as 'Flat', 'IVF1024,Flat' or 'HNSW32'"
            ) from error
        self.tune(index)
        return index

    def tune(self, index: Any) -> None:
        """Sets the search parameters of an index.

        Raises:
            ConfigError: If FAISS does not know one of them for this index.
        """
        import faiss

        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None:
            ivf.nprobe = max(1, math.isqrt(ivf.nlist))
        if self.tuning:
            try:
                space: Any = faiss.ParameterSpace()
                space.set_index_parameters(index, self.tuning)
            except RuntimeError as error:
                raise ConfigError(
                    f"the tuning {self.tuning!r} does not fit the index {self.factory!r} ({_said(error)}); "
                    "give parameters such as 'nprobe=64' for IVF or 'efSearch=128' for HNSW"
                ) from error

    def fewest_rows(self, dim: int) -> int:
        """Rows from which on the index is worth making, and can be trained; fewer are searched exactly."""
        index = self.make(dim)
        centroids = max(largest_codebook(index), OPQ_CENTROIDS if "OPQ" in self.factory else 1)
        return 1 if index.is_trained else max(dim, ROWS_PER_CENTROID * centroids)


def largest_codebook(index: Any) -> int:
    """Centroids of the largest codebook that an index learns by k-means; 1 if it learns none."""
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    most = 1 if ivf is None else int(ivf.nlist)
    inner = index if ivf is None else ivf
    while isinstance(inner, faiss.IndexPreTransform | faiss.IndexRefine):
        inner = faiss.downcast_index(inner.index if hasattr(inner, "index") else inner.base_index)
    quantiser = getattr(faiss.downcast_index(inner), "pq", None)
    return most if quantiser is None else max(most, int(quantiser.ksub))


def _said(error: RuntimeError) -> str:
    """The end of FAISS's message, without the place in its source."""
    return str(error).rstrip().rsplit(": ", maxsplit=1)[-1]
