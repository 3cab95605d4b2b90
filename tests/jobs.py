"""Short configs of embedding jobs, and the files of their directories."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
from pictures import SCENES, encoded

from xbt.data.image_collection import ImageCollection
from xbt.embedding import EmbedConfig
from xbt.store import StoreBuilder


def config(spec, out, images=None, captions=None, **options):
    options = {"shard_size": 10, "batch_size": 4, "dtype": "float32", "num_workers": 0, **options}
    if images is not None and not isinstance(images, ImageCollection):
        images = ImageCollection(str(images))
    return EmbedConfig(spec, str(out), images, captions, **options)


def write_dataset(path, names, parts=2):
    """Write a Hugging Face data set as parquet files, with the names as a column; image n is scene n."""
    rows = [{"bytes": encoded(SCENES.image(n), "PNG"), "path": None} for n in range(len(names))]
    features = datasets.Features({"image": datasets.Image(), "name": datasets.Value("string")})
    whole = datasets.Dataset.from_dict({"image": rows, "name": names}, features=features)
    path.mkdir()
    for number in range(parts):
        whole.shard(parts, number, contiguous=True).to_parquet(str(path / f"train-{number}.parquet"))


def on_record(out, name):
    return [json.loads(line) for line in (Path(out) / name).read_text(encoding="utf-8").splitlines()]


def files(out):
    """Return the files of a store that must not depend on interruptions of its job."""
    names = [path for path in Path(out).rglob("*") if path.is_file()]
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in names
        if path.name not in ("config.yaml", "versions.json", ".lock")
    }


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, shards):
    """Stop a job after it has written this many shards."""
    write, count = StoreBuilder.write, 0

    def limited(self, *arguments, **options):
        nonlocal count
        if count == shards:
            raise Interrupted
        count += 1
        return write(self, *arguments, **options)

    monkeypatch.setattr(StoreBuilder, "write", limited)
