"""Bad input of a backfill: one sentence, before anything is embedded or changed."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
from backfills import COUNT, SCENES, lines, others, scenes

from xbt.backfill import load_merge, run_backfill, save_merge
from xbt.data import CaptionSource
from xbt.data.image_collection import ImageCollection
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, DataError, SpaceMismatchError, StoreError
from xbt.index import AffineMerge, Gallery

LOG = CaptionSource("scenes", limit=9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"commit_every": 0}, "--commit_every must be at least 1, got 0"),
        ({"evaluate_every": -5}, "--evaluate_every must be at least 1, got -5"),
        ({"max_items": 0}, "--max_items must be at least 1, got 0"),
        ({"num_workers": -1}, "--num_workers must be at least 0, got -1"),
        ({"max_hours": 0.0}, "--max_hours must be above 0, got 0.0"),
        ({"items_per_second": float("nan")}, "--items_per_second must be above 0, got nan"),
        ({"recall_target": 60.0}, "--recall_target is a fraction such as 0.6, got 60.0"),
        ({"recall_target": 0.6}, "--recall_target needs --evaluation as well; give it, or leave"),
        ({"stop_when_flat": True}, "--stop_when_flat needs --evaluation as well"),
        ({"evaluation": scenes(), "old": None}, "--evaluation needs --old or --compatible as well"),
        ({"support": scenes(), "old": None}, "--support needs --old or --compatible as well"),
        ({"order": "fastfill"}, "--order fastfill needs --support as well"),
        ({"order": "rehearsed"}, "--order rehearsed needs --support as well"),
        ({"order": "query_log"}, "--order query_log needs --query_log as well"),
        ({"query_log": LOG}, "--query_log is for the orders query_log and rehearsed, and --order is random"),
    ],
)
def test_settings_that_do_not_fit(config, options, words):
    with pytest.raises(ConfigError, match=words):
        config(**options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"gallery": "nowhere"}, StoreError, "nowhere holds no gallery: there is no gallery.sqlite"),
        ({"gallery": "nowhere", "store": "neither"}, StoreError, "neither"),
        ({"output_dir": "/dev/null/x"}, ConfigError, "/dev/null/x cannot be written"),
        (
            {"images": ImageCollection("scenes", limit=9)},
            DataError,
            "none of the 60 items of the gallery .*, first 'scene-test-5-000000', is among the 9 images of "
            "scenes; give the images that it was made of",
        ),
        ({"evaluation": others()}, DataError, "none of the 40 images of --evaluation, first 'scene-val-9"),
        ({"evaluation": scenes(20), "support": scenes(40)}, DataError, "images are both in --support and in"),
        ({"compatible": "nowhere"}, ValueError, "nowhere does not exist"),
    ],
)
def test_what_is_not_there(config, gallery, tmp_path, monkeypatch, options, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        run_backfill(config(**options))
    assert len(Gallery.open(gallery).parts) == 1
    assert not (tmp_path / "nowhere").exists()


def test_encoders_of_other_spaces(config, gallery, models, tmp_path):
    with pytest.raises(DataError, match=r"is of the space of .* already, so there is nothing to backfill"):
        run_backfill(config(encoder=models[0]))
    stranger = tiny.tiny_open_clip(tmp_path / "stranger", seed=9, context_length=77)
    with pytest.raises(SpaceMismatchError, match="which makes old queries"):
        run_backfill(config(old=stranger))
    assert len(Gallery.open(gallery).parts) == 1
    run_backfill(config(max_items=10))
    with pytest.raises(SpaceMismatchError, match="the encoder that the part 'new' is to be filled with"):
        run_backfill(config(encoder=stranger, output_dir=str(tmp_path / "other")))
    assert Gallery.open(gallery).fraction_backfilled == 10 / COUNT


def test_broken_and_missing_images_stay_in_the_old_space(config, photos, old_vectors, tmp_path):
    result = run_backfill(config(**photos))
    rejected = {each["id"]: each["reason"] for each in lines(tmp_path / "out" / "rejected.jsonl")}
    assert sorted(rejected) == ["007.png", "030.png"]
    assert "cannot be decoded" in rejected["007.png"]
    assert "does not exist" in rejected["030.png"]
    made = Gallery.open(photos["gallery"])
    assert sorted(made.ids_of("old")) == sorted(rejected)
    assert (result.items, result.rejected, result.fraction) == (COUNT - 2, 2, (COUNT - 2) / COUNT)
    assert made.search(old_vectors[7:8], 1, part="old").ids == [["007.png"]]
    assert run_backfill(config(**photos)).items == 0
    # Fixed, and removed from the record, they are tried again.
    for row in (7, 30):
        SCENES.image(row).save(tmp_path / "photos" / f"{row:03d}.png")
    (tmp_path / "out" / "rejected.jsonl").unlink()
    assert run_backfill(config(**photos)).items == 2
    assert Gallery.open(photos["gallery"]).fraction_backfilled == 1


def test_a_gallery_is_made_of_a_store(config, gallery, old, old_vectors, tmp_path):
    from xbt.store import EmbeddingStore

    store = EmbeddingStore.create(tmp_path / "store", modality="image", space=old.space, dtype="float32")
    store.append(old_vectors, SCENES.ids)
    options = {"gallery": str(tmp_path / "made"), "store": str(tmp_path / "store")}
    assert run_backfill(config(**options, max_items=10)).items == 10
    assert run_backfill(config(**options)).items == COUNT - 10
    assert Gallery.open(tmp_path / "made").fraction_backfilled == 1
    assert EmbeddingStore.open(tmp_path / "store").ids == SCENES.ids


def test_pairs_that_are_only_partly_in_the_gallery(config, capsys):
    result = run_backfill(config(evaluation=scenes(COUNT + 30), max_items=10))
    assert len(result.curve[0].hits) == 5 * COUNT
    assert (
        "recall is measured with the captions of 60 of 90 images: the others are" in capsys.readouterr().out
    )


def test_a_merge_beside_a_gallery(tmp_path):
    with pytest.raises(DataError, match=r"has no merge\.json; run the backfill with --support, or save one"):
        load_merge(tmp_path)
    save_merge(tmp_path, AffineMerge(2.0, -0.5))
    assert load_merge(tmp_path) == AffineMerge(2.0, -0.5)
    (tmp_path / "merge.json").write_text('{"kind": "magic"}')
    with pytest.raises(ConfigError, match="a merge of kind 'magic' is not known"):
        load_merge(tmp_path)


def test_the_merge_of_an_earlier_job_is_kept(config, gallery):
    save_merge(gallery, AffineMerge(2.0, -0.5))
    run_backfill(config(evaluation=scenes(), max_items=20))
    assert load_merge(gallery) == AffineMerge(2.0, -0.5)


def test_a_merge_is_of_two_spaces(gallery, old, new, tmp_path):
    merge, third = AffineMerge(2.0, -0.5), load_encoder(tiny.tiny_open_clip(tmp_path / "third", seed=4)).space
    save_merge(gallery, merge)  # without spaces it gets those of the gallery, as far as they are known
    assert load_merge(gallery) == merge
    with pytest.raises(SpaceMismatchError, match=r"merge\.json was fitted to .*, but the gallery goes from"):
        load_merge(gallery, third, new.space)
    save_merge(gallery, merge, old.space, new.space)
    assert load_merge(gallery) == load_merge(gallery, old.space, new.space) == merge
    with pytest.raises(SpaceMismatchError, match="run the backfill with --support, or save one"):
        load_merge(gallery, old.space, third)
    made = Gallery.open(gallery)
    made.begin_part(third)
    with pytest.raises(SpaceMismatchError, match="but the gallery goes to"):
        load_merge(gallery)
    save_merge(gallery, merge)
    assert load_merge(gallery, old.space, third) == merge
    made.backfill(np.eye(COUNT, third.dim, dtype=np.float32) + 0.1, SCENES.ids)
    made.compact()  # serving goes on as before
    assert load_merge(gallery) == merge


def test_a_second_upgrade(config, gallery, models, new, tmp_path):
    """The recipe again, from the first new model to a third one, without a flag for it."""
    run_backfill(config(support=others()))
    first = load_merge(gallery)
    Gallery.open(gallery).compact()
    newest = tiny.tiny_open_clip(tmp_path / "newest", seed=3, dim=24, context_length=77)
    again = {"old": models[1], "encoder": newest}
    with pytest.raises(SpaceMismatchError, match=r"was fitted to .*run the backfill with --support"):
        run_backfill(config(**again, output_dir=str(tmp_path / "again")))
    assert len(Gallery.open(gallery).parts) == 1
    options = {**again, "support": others(), "evaluation": scenes()}
    result = run_backfill(config(**options, output_dir=str(tmp_path / "again"), max_items=30))
    made = Gallery.open(gallery)
    assert [(part.name, part.count) for part in made.parts] == [("new", 30), ("new2", 30)]
    assert load_merge(gallery, new.space, load_encoder(newest).space) != first
    assert result.fraction == 0.5
    result = run_backfill(config(**options, output_dir=str(tmp_path / "again")))
    assert (result.items, result.fraction) == (30, 1.0)
