"""One small retrieval data set in every public format, written as the original tools do."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import webdataset

from xbt.data import make_scenes

SPLITS = ("train", "restval", "val", "test", "test", "test")
"""The split of each image."""


@dataclass(frozen=True)
class Photo:
    """One image: COCO's number, file name, split, raw captions, JPEG bytes."""

    number: int
    name: str
    split: str
    captions: list[str]
    jpeg: bytes


def photos(count: int = len(SPLITS), captions: int = 5) -> list[Photo]:
    """Draw scenes with this many captions each (the second has one more), with commas and quotes in them."""
    scenes, made = make_scenes(count, image_size=16), []
    for row in range(count):
        buffer = io.BytesIO()
        scenes.image(row).save(buffer, "JPEG", quality=95)
        texts = [
            scenes.captions[row][0],
            f'A "scene", number {row}.',
            *(f"Take {k} of {row}" for k in range(captions)),
        ]
        number = 391895 + 7 * row
        extra = 1 if row == 1 else 0
        made.append(
            Photo(
                number,
                f"COCO_val2014_{number:012d}.jpg",
                SPLITS[row % len(SPLITS)],
                texts[: captions + extra],
                buffer.getvalue(),
            )
        )
    return made


def of_split(made: list[Photo], *splits: str) -> list[Photo]:
    return [photo for photo in made if photo.split in splits]


def write_images(folder: Path, made: list[Photo]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for photo in made:
        (folder / photo.name).write_bytes(photo.jpeg)
    return folder


def write_karpathy(root: Path, made: list[Photo]) -> Path:
    """``dataset_coco.json`` with its images in ``val2014``."""
    records: list[dict[str, Any]] = []
    sentid = 0
    for imgid, photo in enumerate(made):
        sentences = []
        for caption in photo.captions:
            tokens = caption.lower().replace(",", "").split()
            # Some of COCO's raw sentences end in a line break.
            sentences.append({"tokens": tokens, "raw": f"{caption}\n", "imgid": imgid, "sentid": sentid})
            sentid += 1
        records.append(
            {
                "filepath": "val2014",
                "sentids": [each["sentid"] for each in sentences],
                "filename": photo.name,
                "imgid": imgid,
                "split": photo.split,
                "sentences": sentences,
                "cocoid": photo.number,
            }
        )
    write_images(root / "val2014", made)
    path = root / "dataset_coco.json"
    path.write_text(json.dumps({"images": records, "dataset": "coco"}))
    return path


def write_image_lines(root: Path, made: list[Photo]) -> Path:
    """``flickr30k_test_karpathy.txt`` of CLIP_benchmark."""
    write_images(root, made)
    lines = ["image,caption", *(f"{photo.name},{caption}" for photo in made for caption in photo.captions)]
    path = root / "flickr30k_test_karpathy.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_coco_captions(root: Path, made: list[Photo], name: str = "coco_test_karpathy.json") -> Path:
    """COCO's caption format; annotations of an image need not be adjacent."""
    write_images(root, made)
    images = [
        {"id": photo.number, "file_name": photo.name, "width": 16, "height": 16, "license": 1}
        for photo in made
    ]
    most = max(len(photo.captions) for photo in made)
    pairs = [(photo, k) for k in range(most) for photo in made if k < len(photo.captions)]
    annotations = [
        {"image_id": photo.number, "id": number, "caption": photo.captions[k]}
        for number, (photo, k) in enumerate(pairs)
    ]
    path = root / name
    path.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))
    return path


def write_wds(root: Path, made: list[Photo], split: str = "test", per_shard: int = 2) -> Path:
    """Write a folder as ``clip_benchmark_export_wds`` does."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "dataset_type.txt").write_text("retrieval\n")
    with webdataset.ShardWriter(str(root / split / "%d.tar"), maxcount=per_shard, verbose=0) as sink:
        for index, photo in enumerate(made):
            text = "\n".join(caption.replace("\n", r"\n") for caption in photo.captions)
            sink.write({"__key__": f"s{index:07d}", "jpg": photo.jpeg, "txt": text})
        shards = sink.shard
    (root / split / "nshards.txt").write_text(f"{shards}\n")
    return root


def table(made: list[Photo], **columns: list[Any]) -> datasets.Dataset:
    """A data set with an image column and others."""
    images = [{"bytes": photo.jpeg, "path": photo.name} for photo in made]
    data = datasets.Dataset.from_dict({"image": images, **columns})
    return data.cast_column("image", datasets.Image())


def write_parquet(root: Path, **splits: datasets.Dataset) -> Path:
    """Write a directory in the layout of the Hub: ``data/test-00000-of-00001.parquet``."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    for name, data in splits.items():
        data.to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")
    return root
