"""An interrupted job continues only with the same source, encoder and settings."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tiny
from jobs import Interrupted, config, files, interrupt_after
from pictures import SCENES, write_tar

from xbt.data import CaptionSource, scene_captions
from xbt.embedding import embed, work
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError, SpaceMismatchError, XbtError
from xbt.store import EmbeddingStore


def sources(folder, tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", 20 * number, 20 - number)
    (tmp_path / "a.txt").write_text("\n".join([*scene_captions(35), "", ""]), encoding="utf-8")
    return {
        "folder": {"images": folder},
        "tars": {"images": f"{tmp_path}/*.tar"},
        "captions": {"captions": CaptionSource(str(tmp_path / "a.txt"))},
    }


@pytest.mark.parametrize("kind", ["folder", "tars", "captions"])
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_an_interrupted_job_continues(spec, folder, tmp_path, monkeypatch, kind, shards):
    (folder / "bad.png").write_bytes(b"bad")
    source = sources(folder, tmp_path)[kind]
    embed(config(spec, tmp_path / "whole", **source))
    with monkeypatch.context() as patch:
        interrupt_after(patch, shards)
        with pytest.raises(Interrupted):
            embed(config(spec, tmp_path / "cut", **source))
    done = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*.npy") if path.name[0] != "."
    }
    assert len(done) == shards
    seen = []
    real = work.ShardPlan.batches

    def watched(self, *arguments):
        for batch in real(self, *arguments):
            seen.append(batch.shard)
            yield batch

    monkeypatch.setattr(work.ShardPlan, "batches", watched)
    store = embed(config(spec, tmp_path / "cut", **source))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())  # no file was rewritten
    assert len(set(seen)) == len(store.shards) - shards
    store.verify()


def test_a_finished_job_does_nothing(spec, folder, tmp_path, monkeypatch, capsys):
    embed(config(spec, tmp_path / "out", folder))
    before = files(tmp_path / "out")
    monkeypatch.setattr(work, "_embed_images", lambda *arguments: pytest.fail("images were embedded again"))
    again = embed(config(spec, tmp_path / "out", folder, batch_size=7))
    assert len(again) == 47
    assert files(tmp_path / "out") == before
    assert "is finished already: 47 vectors" in capsys.readouterr().out


def test_some_settings_may_change_on_the_way(spec, folder, tmp_path, monkeypatch):
    embed(config(spec, tmp_path / "whole", folder))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            embed(config(spec, tmp_path / "cut", folder))
    store = embed(config(spec, tmp_path / "cut", folder, batch_size=3, num_workers=1))
    assert np.abs(store.read() - EmbeddingStore.open(tmp_path / "whole").read()).max() <= 1e-6
    for option in ({"shard_size": 5}, {"dtype": "float16"}, {"precision": "bf16"}):
        with pytest.raises(ConfigError, match="holds a run with other settings"):
            embed(config(spec, tmp_path / "cut", folder, **option))


def test_a_source_that_has_changed_is_refused(spec, folder, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        embed(config(spec, tmp_path / "out", folder))
    SCENES.image(60).save(folder / "new.png")
    with pytest.raises(DataError, match=r"photos has changed since .*\(47 items then, 48 items now"):
        embed(config(spec, tmp_path / "out", folder))
    (folder / "new.png").rename(folder / "0/000.png.tmp")
    with pytest.raises(Interrupted):
        embed(config(spec, tmp_path / "out", folder))
    (folder / "0/000.png").rename(folder / "0/zzz.png")
    with pytest.raises(DataError, match="or others in their place"):
        embed(config(spec, tmp_path / "out", folder))


def test_streams_that_have_changed_are_refused(spec, tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", 0, 5)
    interrupt_after(monkeypatch, 0)
    with pytest.raises(Interrupted):
        embed(config(spec, tmp_path / "out", f"{tmp_path}/*.tar"))
    write_tar(tmp_path / "1.tar", 5, 5)
    with pytest.raises(DataError, match="1 parts then, 2 parts now"):
        embed(config(spec, tmp_path / "out", f"{tmp_path}/*.tar"))


def test_another_model_behind_the_same_name_is_refused(folder, tmp_path, monkeypatch):
    spec = tiny.tiny_open_clip(tmp_path / "model", seed=0)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            embed(config(spec, tmp_path / "out", folder))
    shutil.rmtree(tmp_path / "model")
    assert tiny.tiny_open_clip(tmp_path / "model", seed=1) == spec
    with pytest.raises(SpaceMismatchError):
        embed(config(spec, tmp_path / "out", folder))
    store = embed(config(spec, tmp_path / "out", folder, overwrite=True))
    assert (
        np.abs(
            store.read()
            - load_encoder(spec)
            .encode_images(store.metadata(["image_path"])["image_path"].to_pylist())
            .numpy()
        ).max()
        <= 1e-6
    )


def test_overwriting_keeps_vectors_of_others(spec, folder, tmp_path):
    foreign = tmp_path / "out/img_emb/img_emb_0.npy"
    foreign.parent.mkdir(parents=True)
    np.save(foreign, np.eye(16, dtype=np.float16))
    with pytest.raises(XbtError, match=r"already holds img_emb/img_emb_0\.npy"):
        embed(config(spec, tmp_path / "out", folder, overwrite=True))
    assert np.array_equal(np.load(foreign), np.eye(16))


def test_overwriting_keeps_other_files(spec, folder, tmp_path):
    embed(config(spec, tmp_path / "out", folder))
    own = tmp_path / "out/metadata/my_labels.parquet"
    own.write_bytes(b"mine")
    store = embed(config(spec, tmp_path / "out", folder, overwrite=True, shard_size=20))
    assert [shard.count for shard in store.shards] == [20, 20, 7]
    assert sorted(path.name for path in own.parent.iterdir()) == [
        "metadata_0.parquet", "metadata_1.parquet", "metadata_2.parquet", "my_labels.parquet",
    ]  # fmt: skip
    store.verify()
