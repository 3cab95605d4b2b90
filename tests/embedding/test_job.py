"""The embedding job in one process: the right vectors under the right ids, and a record of every item."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from jobs import config, on_record, write_dataset
from pictures import SCENES, write_tar

from xbt.data import CaptionSource, make_scenes, scene_captions
from xbt.data.image_collection import ImageCollection
from xbt.embedding import embed, embed_texts_into_store, job, work
from xbt.errors import ConfigError, DataError, TruncationWarning, XbtError


def test_images_of_a_folder(spec, encoder, folder, tmp_path, capsys):
    store = embed(config(spec, tmp_path / "out", folder))
    paths = sorted(str(path) for path in folder.rglob("*.png"))
    assert store.ids == [str(Path(path).relative_to(folder)) for path in paths]
    assert np.abs(store.read() - encoder.encode_images(paths).numpy()).max() <= 1e-6
    assert store.metadata(["image_path"])["image_path"].to_pylist() == paths
    assert [shard.count for shard in store.shards] == [10, 10, 10, 10, 7]
    assert (store.modality, store.dtype) == ("image", "float32")
    assert store.space.same_as(encoder.space)
    store.verify()
    assert on_record(tmp_path / "out", "rejected.jsonl") == on_record(tmp_path / "out", "notes.jsonl") == []
    assert "embedded 47 images in" in capsys.readouterr().out
    assert {"config.yaml", "versions.json", "manifest.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert not (tmp_path / "out/in_progress").exists()


def test_half_precision_on_disk(spec, encoder, tmp_path):
    out = tmp_path / "out"
    store = embed(config(spec, out, ImageCollection("scenes", limit=12), dtype="float16"))
    expected = encoder.encode_images(make_scenes(12).images).numpy()
    assert np.array_equal(store.read(), expected.astype(np.float16).astype(np.float32))
    assert np.load(out / "img_emb/img_emb_0.npy").dtype == np.float16


def test_captions_with_repetitions(spec, encoder, tmp_path):
    captions = [*[*scene_captions(20), "a dog"] * 2, "a dog"]
    (tmp_path / "a.txt").write_text("\n".join(captions), encoding="utf-8")
    store = embed(config(spec, tmp_path / "out", captions=CaptionSource(str(tmp_path / "a.txt"))))
    assert store.modality == "text"
    assert store.ids == [f"row-{number}" for number in range(43)]
    assert store.metadata(["caption"])["caption"].to_pylist() == captions
    assert np.abs(store.read() - encoder.encode_texts(captions).numpy()).max() <= 1e-6


def test_blank_captions_are_rejected(spec, encoder, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n   \n", encoding="utf-8")
    store = embed(
        config(spec, tmp_path / "out", captions=CaptionSource(str(tmp_path / "a.txt")), shard_size=2)
    )
    assert store.ids == ["row-0", "row-2"]
    assert on_record(tmp_path / "out", "rejected.jsonl") == [
        {"id": "row-1", "reason": "the caption is blank"},
        {"id": "row-3", "reason": "the caption is blank"},
    ]


def test_truncation_warns_once(open_clip_spec, tmp_path):
    long = "\n".join(["a red circle " * 30] * 9)
    (tmp_path / "a.txt").write_text(long, encoding="utf-8")
    source = CaptionSource(str(tmp_path / "a.txt"))
    with pytest.warns(TruncationWarning, match="shard 0: 3 of 3 texts") as caught:
        embed(config(open_clip_spec, tmp_path / "out", captions=source, shard_size=3))
    assert len(caught) == 1


def test_nothing_can_be_embedded(spec, tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="none of 5 images could be embedded"):
        store = embed(config(spec, tmp_path / "out", tmp_path, shard_size=2))
    assert len(store) == 0
    assert len(on_record(tmp_path / "out", "rejected.jsonl")) == 5


def test_tars_with_a_cut_one(spec, encoder, tmp_path):
    for number, (first, count) in enumerate([(0, 20), (20, 13), (33, 10), (43, 4)]):
        write_tar(tmp_path / f"{number}.tar", first, count)
    cut = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(cut[: len(cut) // 2])
    store = embed(config(spec, tmp_path / "out", f"{tmp_path}/{{0..3}}.tar"))
    numbers = [int(name[-4:]) for name in store.ids]
    kept = max(number for number in numbers if number < 33) - 19
    assert 0 < kept < 13
    assert numbers == [*range(20 + kept), *range(33, 47)]
    assert store.ids[0] == "0/0000"
    expected = encoder.encode_images([SCENES.images[number] for number in numbers]).numpy()
    assert np.abs(store.read() - expected).max() <= 1e-6
    (record,) = on_record(tmp_path / "out", "rejected.jsonl")
    assert record["id"] == "1"
    names = [shard.name for shard in store.shards]
    # Twenty entries are two full shards, of which the second is known to be the last.
    assert names[:2] == ["0_00000", "0_00001"]
    assert names[-2:] == ["2_00000", "3_00000"]


def test_a_stream_equals_the_listed_data_set(spec, tmp_path):
    write_dataset(tmp_path / "data", [f"n{n}" for n in range(25)], parts=3)
    stores = [
        embed(
            config(
                spec,
                tmp_path / f"out_{streaming}",
                ImageCollection(f"hf:{tmp_path / 'data'}", id_column="name", streaming=streaming),
                shard_size=4,
            )
        )
        for streaming in (False, True)
    ]
    assert stores[0].ids == stores[1].ids == [f"n{n}" for n in range(25)]
    assert np.abs(stores[0].read() - stores[1].read()).max() <= 1e-6


def test_repeated_ids_of_a_stream_are_rejected(spec, encoder, tmp_path):
    names = [f"k{number}" for number in range(30)]
    names[2], names[8], names[20] = "k1", "k0", "k0"  # in the same shard, in another, and in another part
    write_dataset(tmp_path / "data", names)
    stream = ImageCollection(f"hf:{tmp_path / 'data'}", id_column="name", streaming=True)
    store = embed(config(spec, tmp_path / "out", stream, shard_size=4))
    kept = [number for number in range(30) if number not in (2, 8, 20)]
    assert store.ids == [f"k{number}" for number in kept]
    expected = encoder.encode_images([SCENES.image(number) for number in kept]).numpy()
    assert np.abs(store.read() - expected).max() <= 1e-6
    assert on_record(tmp_path / "out", "rejected.jsonl") == [
        {"id": "k1", "reason": "the id 'k1' is already that of an earlier item"},
        {"id": "k0", "reason": "the id 'k0' is already that of an item of shard 0_00000"},
        {"id": "k0", "reason": "the id 'k0' is already that of an item of shard 0_00000"},
    ]
    store.verify()
    assert len(embed(config(spec, tmp_path / "out", stream, shard_size=4))) == 27


# Errors


def test_a_disk_that_is_too_small(spec, folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=47 * 16 * 4 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"47 vectors of 16 float32 need 3.01e-06 GB, but .* has only"):
        embed(config(spec, tmp_path / "out", folder))
    assert len(embed(config(spec, tmp_path / "half", folder, dtype="float16"))) == 47
    monkeypatch.undo()
    assert len(embed(config(spec, tmp_path / "out", folder))) == 47


def test_an_unwritable_directory_is_noticed_before_the_model_is_loaded(spec, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "load_encoder", lambda *arguments: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a directory"):
        embed(config(spec, tmp_path / "file", folder))
    with pytest.raises(ConfigError, match=r"--output_dir .*file/below cannot be written: Not a directory"):
        embed(config(spec, tmp_path / "file/below", folder))
    with pytest.raises(DataError, match="nowhere does not exist"):
        embed(config(spec, tmp_path / "out", tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_wrong_encoder_leaves_no_files_behind(spec, folder, tmp_path):
    with pytest.raises(XbtError):
        embed(config("open_clip:no-such-model/x", tmp_path / "out", folder))
    assert len(embed(config(spec, tmp_path / "out", folder))) == 47


def test_nan_stops_the_job_and_keeps_finished_shards(spec, folder, tmp_path, monkeypatch):
    real = work.DualEncoder.embed_pixels
    calls = 0

    def broken(self, pixels):
        nonlocal calls
        calls += 1
        vectors = real(self, pixels)
        return vectors * float("nan") if calls > 8 else vectors

    with monkeypatch.context() as patch:
        patch.setattr(work.DualEncoder, "embed_pixels", broken)
        with pytest.raises(XbtError, match="NaN"):
            embed(config(spec, tmp_path / "out", folder))
    assert len(list((tmp_path / "out/in_progress").glob("[0-9].json"))) == 2
    assert len(embed(config(spec, tmp_path / "out", folder))) == 47


@pytest.mark.parametrize("given", [{}, {"images": "x", "captions": CaptionSource("y.txt")}])
def test_images_or_captions_but_not_both(given):
    with pytest.raises(
        ConfigError, match=r"--images\.source or --captions\.source: (both were|neither was) given"
    ):
        config("x", "y", **given)


@pytest.mark.parametrize("option", [{"shard_size": 0}, {"batch_size": 0}, {"num_workers": -1}])
def test_numbers_that_are_too_small(option):
    with pytest.raises(ConfigError, match=f"--{next(iter(option))} must be at least"):
        config("x", "y", "folder", **option)


# Texts from Python


def test_texts_into_a_store(encoder, tmp_path):
    texts = scene_captions(23)
    names = [f"t{number}" for number in range(23)]
    store = embed_texts_into_store(encoder, texts, names, tmp_path / "s", shard_size=5, dtype="float32")
    assert store.ids == names
    assert np.abs(store.read() - encoder.encode_texts(texts).numpy()).max() <= 1e-6
    again = embed_texts_into_store(encoder, texts, names, tmp_path / "s", shard_size=5, dtype="float32")
    assert len(again) == 23
    other = [*texts[:-1], "a dog"]
    with pytest.raises(DataError, match="the texts has changed since"):
        embed_texts_into_store(encoder, other, names, tmp_path / "s", shard_size=5, dtype="float32")
    with pytest.raises(ConfigError, match="was started with shard_size 5, and now it is 6"):
        embed_texts_into_store(encoder, texts, names, tmp_path / "s", shard_size=6, dtype="float32")
    new = embed_texts_into_store(
        encoder, other, names, tmp_path / "s", shard_size=6, dtype="float32", overwrite=True
    )
    assert np.abs(new.read() - encoder.encode_texts(other).numpy()).max() <= 1e-6


@pytest.mark.parametrize(
    ("texts", "names", "words"),
    [
        (["a"], ["x", "y"], "1 texts and 2 ids"),
        ([], [], "0 texts and 0 ids"),
        (["a", " "], ["x", "y"], "the text 'y' is blank"),
        (["a", "b"], ["x", "x"], "'x'"),
    ],
)
def test_texts_that_cannot_become_a_store(encoder, tmp_path, texts, names, words):
    with pytest.raises(XbtError, match=words):
        embed_texts_into_store(encoder, texts, names, tmp_path / "s")
