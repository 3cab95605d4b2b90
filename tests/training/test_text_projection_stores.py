"""Stage 1 from stores: the same result as from memory, and memory that does not grow with the corpus."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from xbt.config import parse_config
from xbt.data import CaptionSource, read_captions
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError, StoreError
from xbt.projections import Projection
from xbt.run_dir import RunDirectory
from xbt.space import EmbeddingSpace
from xbt.store import EmbeddingStore, StoreBuilder
from xbt.training import TextProjectionConfig, TrainArgs, pretrain_text_projection
from xbt.training.cached_vectors import TextVectors, open_text_stores
from xbt.training.loop import make_accelerator
from xbt.training.text_projection import train_text_projection

pytestmark = pytest.mark.filterwarnings("ignore::xbt.errors.TruncationWarning")
NEW, OLD = EmbeddingSpace("new-model", 24), EmbeddingSpace("old-model", 16)


def unit_rows(n, dim, seed):
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1).numpy()


def write_store(path, space, rows, ids, captions=None, modality="text", dtype="float32", sizes=(170, 1)):
    """Writes rows into shards of uneven sizes: those given, then one with the rest."""
    store = EmbeddingStore.create(path, modality=modality, space=space, dtype=dtype)
    borders = [0, *np.cumsum(sizes).tolist(), len(rows)]
    for start, stop in pairwise(borders):
        metadata = None if captions is None else {"caption": captions[start:stop]}
        if start < min(stop, len(rows)):
            store.append(rows[start : min(stop, len(rows))], ids[start:stop], metadata)
    return store


def two_stores(tmp_path, n=400, captions=None, **changes):
    """Two stores of the same texts, sharded differently, and their rows."""
    ids = [f"text {row}" for row in range(n)]
    old_rows = unit_rows(n, 16, 0)
    new_rows = unit_rows(n, 24, 1) * 0.2
    new_rows[:, :16] += old_rows * np.linspace(1, 0.1, 16, dtype=np.float32)
    new_rows /= np.linalg.norm(new_rows, axis=1, keepdims=True)
    write_store(tmp_path / "new", NEW, new_rows, ids, captions, **changes)
    write_store(tmp_path / "old", OLD, old_rows, ids, captions, sizes=(10, 300), **changes)
    return new_rows, old_rows


def settings(tmp_path, **changes):
    training = TrainArgs(steps=20, batch_size=64, lr=3e-3, warmup_steps=2, eval_every=5, checkpoint_every=5)
    base = {
        "old_store": str(tmp_path / "old"), "new_store": str(tmp_path / "new"),
        "output_dir": str(tmp_path / "run"), "training": training, "held_out": 50,
    }  # fmt: skip
    return TextProjectionConfig(**{**base, **changes})


def train_in_memory(config, new, old):
    run = RunDirectory(config.output_dir, config)
    accelerator = make_accelerator(config.training, run, config, "test")
    return train_text_projection(TextVectors(new, old), config, accelerator, run)[0]


def assert_same(one, other, tolerance=1e-6):
    for name, tensor in one.state_dict().items():
        assert (tensor - other.state_dict()[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_stores_train_what_tensors_train(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("xbt.training.cached_vectors._ROWS_AT_ONCE", 37)
    new, old = two_stores(tmp_path, dtype=dtype)
    from_stores = pretrain_text_projection(settings(tmp_path))
    tensors = [torch.from_numpy(rows.astype(dtype).astype(np.float32)) for rows in (new, old)]
    in_memory = train_in_memory(settings(tmp_path, output_dir=str(tmp_path / "memory")), *tensors)
    assert_same(from_stores, in_memory)
    result = json.loads((tmp_path / "run/result.json").read_text())
    train = np.random.default_rng(0).permutation(400)[50 if result["best_step"] else 0 :]
    products = tensors[0][train].double().numpy().T @ tensors[1][train].double().numpy()
    left, _, right = np.linalg.svd(products, full_matrices=False)
    assert np.abs(from_stores.weight.numpy(force=True) - (left @ right).T).max() <= 1e-6
    saved = Projection.from_pretrained(tmp_path / "run" / "projection")
    assert (saved.new_space.model, saved.old_space.model) == ("new-model", "old-model")


def test_encoders_and_captions_train_what_their_vectors_train(tmp_path, open_clip_spec, transformers_spec):
    captions = CaptionSource("scenes", limit=300)
    ways = {"old_store": None, "new_store": None, "old": open_clip_spec, "new": transformers_spec}
    from_texts = pretrain_text_projection(settings(tmp_path, captions=captions, **ways))
    texts = list(dict.fromkeys(read_captions(captions)))
    config = settings(tmp_path, output_dir=str(tmp_path / "memory"))
    run = RunDirectory(config.output_dir, config)
    accelerator = make_accelerator(config.training, run, config, "test")
    new, old = (load_encoder(spec).encode_texts(texts) for spec in (transformers_spec, open_clip_spec))
    in_memory, _ = train_text_projection(TextVectors(new, old), config, accelerator, run)
    assert_same(from_texts, in_memory)
    folder = tmp_path / "run" / "vectors"
    for side, rows in (("new", new), ("old", old)):
        store = EmbeddingStore.open(folder / side)
        assert (store.dtype, store.metadata(["caption"])["caption"].to_pylist()) == ("float32", texts)
        assert np.abs(store.read() - rows.numpy()).max() <= 1e-6
    # What one run has embedded is a corpus for the next.
    stores = {"new_store": str(folder / "new"), "old_store": str(folder / "old")}
    again = pretrain_text_projection(settings(tmp_path, output_dir=str(tmp_path / "again"), **stores))
    assert torch.equal(again.weight, from_texts.weight)


def test_repeated_captions_count_once(tmp_path):
    captions = [f"caption {row % 150}" if row < 300 else None for row in range(400)]
    new, old = two_stores(tmp_path, captions=captions)
    vectors = open_text_stores(str(tmp_path / "new"), str(tmp_path / "old"))
    first = [*range(150), *range(300, 400)]
    assert vectors.rows.tolist() == first
    assert vectors.rows.dtype.itemsize <= 8
    positions = np.array([249, 0, 151])
    taken = vectors.take(positions)
    np.testing.assert_array_equal(taken[0], new[[399, 0, 301]])
    np.testing.assert_array_equal(taken[1], old[[399, 0, 301]])
    tensors = [torch.from_numpy(rows[first]) for rows in (new, old)]
    in_memory = train_in_memory(settings(tmp_path, output_dir=str(tmp_path / "memory")), *tensors)
    assert_same(pretrain_text_projection(settings(tmp_path)), in_memory)


def test_texts_that_do_not_pair_are_named(tmp_path):
    n = 9_000  # more than are compared at a time
    ids = [f"text {row}" for row in range(n)]
    rows = unit_rows(n, 16, 0)
    write_store(tmp_path / "new", NEW, unit_rows(n, 24, 0), ids, ids, sizes=(8_500,))
    write_store(tmp_path / "id", OLD, rows, [*ids[:8_777], "other", *ids[8_778:]])
    write_store(tmp_path / "short", OLD, rows[:-1], ids[:-1])
    write_store(tmp_path / "caption", OLD, rows, ids, [*ids[:8_999], "a dog"])
    for name, words in (
        (
            "id",
            r"row 8777 has the id 'text 8777' in --new_store .*new but 'other' in --old_store .*id; embed",
        ),
        ("short", r"--new_store .* has 9000 rows and --old_store .*short has 8999"),
        ("caption", r"row 8999 has the caption 'text 8999' in --new_store .* but 'a dog' in --old_store"),
    ):
        with pytest.raises(DataError, match=words):
            pretrain_text_projection(settings(tmp_path, old_store=str(tmp_path / name)))
        assert not (tmp_path / "run").exists()


def test_stores_that_do_not_fit_are_refused(tmp_path):
    ids = [f"text {row}" for row in range(60)]
    two_stores(tmp_path, n=60)
    write_store(tmp_path / "images", OLD, unit_rows(60, 16, 0), ids, modality="image")
    (tmp_path / "foreign" / "text_emb").mkdir(parents=True)
    np.save(tmp_path / "foreign" / "text_emb" / "text_emb_0.npy", unit_rows(60, 16, 0))
    for name, error, words in (
        ("images", StoreError, r"--old_store: .*images is a store of image vectors, not of 'text'"),
        (
            "foreign",
            StoreError,
            r"--old_store: .*foreign does not say which model made its vectors.*recipes/embed",
        ),
        ("nowhere", StoreError, r"--old_store: there is no store at .*nowhere"),
    ):
        with pytest.raises(error, match=words):
            pretrain_text_projection(settings(tmp_path, old_store=str(tmp_path / name)))


def test_nan_in_a_store_is_named(tmp_path):
    two_stores(tmp_path, n=100)
    path = next((tmp_path / "new" / "text_emb").iterdir())
    rows = np.load(path)
    rows[17, 3] = np.nan
    np.save(path, rows)
    training = TrainArgs(steps=1, batch_size=8)
    with pytest.raises(
        StoreError, match=r"text_emb_000000\.npy of shard '000000' has NaN or infinity, first in its row 17"
    ):
        pretrain_text_projection(settings(tmp_path, training=training))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"new": "n"},
            r"--old_store and --new_store take the place of --old, --new and --captions, but --new was",
        ),
        (
            {"captions": CaptionSource("scenes"), "old_store": None},
            r"--new_store take.* but --captions was",
        ),
        ({"old_store": None}, r"needs --old, --new and --captions, or .*; --old_store is missing"),
        ({"old_store": None, "new_store": None}, r"or --old_store and --new_store in their place$"),
        ({"old_store": None, "new_store": None, "old": "o"}, r"; --new and --captions is missing"),
        ({"output_dir": " "}, r"--output_dir is missing"),
    ],
)
def test_texts_are_given_in_one_way(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words):
        settings(tmp_path, **given)


def test_the_command_line_knows_both_ways():
    by_captions = "--old a --new b --captions.source c.txt --captions.limit 7 --output_dir out"
    config = parse_config(TextProjectionConfig, by_captions.split())
    assert config.captions == CaptionSource("c.txt", limit=7)
    by_stores = "--old_store a --new_store b --output_dir out"
    config = parse_config(TextProjectionConfig, by_stores.split())
    assert (config.captions, config.old_store, config.new_store) == (None, "a", "b")
    with pytest.raises(ConfigError, match="--old_store is missing"):
        parse_config(TextProjectionConfig, ["--new_store", "b", "--output_dir", "out"])


CHILD = """
    import sys, time
    from xbt.training import TextProjectionConfig, TrainArgs, pretrain_text_projection
    began = time.perf_counter()
    new, old, out = sys.argv[1:]
    args = TrainArgs(steps=30, batch_size=1024, eval_every=30, checkpoint_every=0, warmup_steps=5)
    config = TextProjectionConfig(new_store=new, old_store=old, output_dir=out, training=args)
    pretrain_text_projection(config)
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print("PEAK", peak / 2**20, "SECONDS", time.perf_counter() - began)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_two_million_pairs_need_no_more_memory_than_a_batch(tmp_path):
    count, per_shard = 2_000_000, 100_000
    for name, dim in (("new", 768), ("old", 512)):
        space = EmbeddingSpace(name, dim)
        builder = StoreBuilder(tmp_path / name, modality="text", space=space)
        builder.prepare()
        block = unit_rows(per_shard, dim, seed=dim).astype(np.float16)
        for shard in range(count // per_shard):
            ids = [str(row) for row in range(shard * per_shard, (shard + 1) * per_shard)]
            metadata = {"caption": [f"a photo of thing number {name}" for name in ids]}
            builder.write(f"{shard:02d}", np.roll(block, 7 * shard, axis=1), ids, metadata)
        builder.finish(f"{shard:02d}" for shard in range(count // per_shard))
        del block
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(CHILD),
        *(str(tmp_path / x) for x in ("new", "old", "run")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for name in ("new", "old"):  # pytest keeps what is left, and this is 5 GB
        shutil.rmtree(tmp_path / name)
    assert done.returncode == 0, done.stderr
    peak = float(done.stdout.split("PEAK ")[1].split()[0])
    print(done.stdout)
    assert peak < 2.0  # GiB; the vectors themselves are 4.8


def test_stores_of_another_length_are_not_paired(tmp_path):
    two_stores(tmp_path)
    write_store(tmp_path / "short", OLD, unit_rows(399, 16, 0), [f"text {row}" for row in range(399)], None)
    new, short = EmbeddingStore.open(tmp_path / "new"), EmbeddingStore.open(tmp_path / "short")
    with pytest.raises(DataError, match="there are 400 new and 399 old rows"):
        train_in_memory(settings(tmp_path), new, short)
