"""Vectors, spaces and an oracle for the tests of galleries."""

from __future__ import annotations

import multiprocessing
import os

import faiss
import numpy as np
import torch

from xbt.space import EmbeddingSpace


def unit(n, dim, seed=0):
    vectors = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def names(n, start=0):
    return [f"image-{i:04d}" for i in range(start, start + n)]


def make_space(model="old", dim=16, seed=0):
    return EmbeddingSpace(model, dim, {"backend": "pil"}, unit(20, dim, seed))


def brute_force(vectors, ids, queries, k):
    """Scores in double precision; equal ones in the gallery's order."""
    scores = np.asarray(queries, np.float64) @ np.asarray(vectors, np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [[ids[i] for i in row] for row in order], np.take_along_axis(scores, order, axis=1)


def as_items(vectors, ids):
    return dict(zip(ids, np.asarray(vectors), strict=True))


def assert_finds(gallery, items, queries, k=None, **options):
    """Compares a search with brute force over ``items``, a dict of vectors in the gallery's order."""
    k = len(items) if k is None else k
    found = gallery.search(queries, k, **options)
    ids, scores = brute_force(np.stack(list(items.values())), list(items), queries, k)
    assert found.ids == ids
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)


FORK = multiprocessing.get_context("fork") if os.name != "nt" else None


def start(target, *arguments):
    """Runs a child; returns its process and the pipe that it reports to, which ends when the child does."""
    here, there = FORK.Pipe(duplex=False)
    child = FORK.Process(target=target, args=(*arguments, there))
    child.start()
    there.close()
    return child, here


def quiet():
    """A forked child begins with this: it does not have the threads that FAISS has started in its parent."""
    faiss.omp_set_num_threads(1)
