from __future__ import annotations

import json

import pytest
import torch
from fuzzing import damaged_json, fuzzed, loads_or_refuses
from hypothesis import given

from xbt.errors import DataError, SpaceMismatchError, UnverifiedSpaceWarning
from xbt.space import PROBE_TEXTS, SAME_COSINE, EmbeddingSpace


def probe(dim=32, seed=0):
    vectors = torch.randn(20, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def make_space(model="a", dim=32, seed=0):
    return EmbeddingSpace(model, dim, {"backend": "pil", "size": 224}, probe(dim, seed))


def test_equal_probes_are_one_space_whatever_the_name():
    assert make_space("a").same_as(make_space("b"))
    assert make_space("a").agreement(make_space("b")) == pytest.approx(1.0, abs=1e-6)
    make_space("a").require(make_space("b"), "x")


def test_other_probes_are_other_spaces_even_under_one_name():
    assert not make_space("a", seed=0).same_as(make_space("a", seed=1))


def test_the_worst_probe_vector_decides():
    ours, theirs = make_space(), make_space()
    theirs.probe[7] = -theirs.probe[7]
    assert ours.agreement(theirs) == pytest.approx(-1.0, abs=1e-6)
    assert not ours.same_as(theirs)


@pytest.mark.parametrize(("cosine", "same"), [(SAME_COSINE + 2e-4, True), (SAME_COSINE - 2e-4, False)])
def test_the_threshold(cosine, same):
    ours = make_space()
    noise = probe(seed=1)
    sideways = torch.nn.functional.normalize(
        noise - (noise * ours.probe).sum(1, keepdim=True) * ours.probe, dim=1
    )
    theirs = EmbeddingSpace("b", 32, {}, cosine * ours.probe + (1 - cosine**2) ** 0.5 * sideways)
    assert ours.same_as(theirs) is theirs.same_as(ours) is same


def test_without_a_probe_names_decide():
    named, unnamed = EmbeddingSpace("a", 32), EmbeddingSpace("b", 32)
    assert named.agreement(make_space("a")) is None
    assert named.same_as(make_space("a"))
    assert make_space("a").same_as(named)
    assert not unnamed.same_as(make_space("a"))
    with pytest.raises(SpaceMismatchError, match="one has no probe to compare"):
        named.require(unnamed, "x")


def test_another_dimension_is_another_space():
    small = EmbeddingSpace("a", 16, {}, probe(16))
    assert make_space("a").agreement(small) is None
    assert not make_space("a").same_as(small)
    assert not EmbeddingSpace("a", 16).same_as(EmbeddingSpace("a", 32))
    with pytest.raises(SpaceMismatchError, match="their dimensions differ"):
        make_space("a").require(small, "x")


def test_a_refusal_names_both_spaces_and_the_offer():
    with pytest.raises(SpaceMismatchError) as caught:
        make_space("old model").require(make_space("new model", seed=1), "the query vectors")
    message = str(caught.value)
    assert message.startswith("the space of the query vectors is 'new model' (32-d)")
    assert "'old model' (32-d) is needed" in message
    assert "agree only to a cosine of" in message


def test_json_round_trip():
    space = make_space("öld")
    copy = EmbeddingSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert (copy.model, copy.dim, copy.preprocessing) == ("öld", 32, {"backend": "pil", "size": 224})
    assert copy.probe.dtype == torch.float32
    assert torch.equal(copy.probe, space.probe.half().float())
    assert space.agreement(copy) > 0.99999
    assert copy.to_dict() == space.to_dict()


def test_json_round_trip_without_a_probe():
    copy = EmbeddingSpace.from_dict(json.loads(json.dumps(EmbeddingSpace("a", 8).to_dict())))
    assert copy.probe is None
    assert copy.same_as(EmbeddingSpace("a", 8))


def test_a_name_without_a_probe_is_reported_as_unverified():
    named = EmbeddingSpace("a", 32)
    found = make_space("a").compare(named)
    assert (found.same, found.verified) == (True, False)
    with pytest.warns(UnverifiedSpaceWarning, match=r"the space of x, 'a' \(32-d\), is unverified"):
        make_space("a").require(named, "x")
    assert make_space("a").compare(make_space("b")).verified


def test_names_are_not_enough_where_revision_or_preprocessing_are_known_to_differ():
    space = EmbeddingSpace("a", 32, {"interpolation": "bicubic"}, revision="1" * 40)
    other = EmbeddingSpace("a", 32, {"interpolation": "bicubic"}, revision="2" * 40)
    with pytest.raises(SpaceMismatchError, match="their revisions differ") as caught:
        space.require(other, "x")
    assert "'a' at 111111111111" in str(caught.value)
    assert "'a' at 222222222222" in str(caught.value)
    bilinear = EmbeddingSpace("a", 32, {"interpolation": "bilinear"})
    with pytest.raises(SpaceMismatchError, match="interpolation bicubic and bilinear"):
        space.require(bilinear, "x")
    assert space.same_as(EmbeddingSpace("a", 32))


def test_another_revision_with_the_same_vectors_is_the_same_space():
    first = EmbeddingSpace("a", 32, {}, probe(), revision="1" * 40)
    assert first.same_as(EmbeddingSpace("a", 32, {}, probe(), revision="2" * 40))


def test_rows_of_another_length_are_another_space():
    raw = EmbeddingSpace("a", 32, {}, probe(), normalisation="none")
    with pytest.raises(SpaceMismatchError, match="normalised differently: 'unit' and 'none'"):
        EmbeddingSpace("a", 32, {}, probe()).require(raw, "x")


def test_a_refusal_says_which_tower_differs():
    ours, texts, images = probe(), probe(), probe()
    texts[3] = -texts[3]
    images[17] = -images[17]
    settings = ({"size": [224, 224], "mean": [0.5]}, {"size": [224, 224], "mean": [0.48]})
    space = EmbeddingSpace("a", 32, settings[0], ours)
    assert space.compare(EmbeddingSpace("a", 32, settings[1], texts)).reason.endswith("in texts alone")
    other = EmbeddingSpace("a", 32, settings[0], texts, settings={"text_cleaning": "lower"})
    clean = EmbeddingSpace("a", 32, settings[1], ours, settings={"text_cleaning": "none"})
    assert clean.compare(other).reason.endswith("in texts alone: text_cleaning none and lower")
    reason = space.compare(EmbeddingSpace("a", 32, settings[1], images)).reason
    assert reason.endswith("in images alone: mean [0.5] and [0.48]")


def test_a_probe_of_another_version_cannot_be_compared():
    saved = make_space().to_dict()
    saved["probe_version"] = 1
    assert EmbeddingSpace.from_dict(saved).probe is None
    assert not make_space().compare(EmbeddingSpace.from_dict(saved)).verified


def test_models_without_a_text_tower_are_compared_by_images_alone():
    images = probe()
    images[: len(PROBE_TEXTS)] = 0
    space = EmbeddingSpace("a", 32, {}, images)
    assert space.same_as(EmbeddingSpace("b", 32, {}, images.clone()))
    assert not space.same_as(EmbeddingSpace("a", 32, {}, probe()))  # a text tower on one side alone
    other = images.clone()
    other[-1] = -other[-1]
    assert not space.same_as(EmbeddingSpace("a", 32, {}, other))


DECLARED = {
    "activation": ({}, {"text_activation": "quick_gelu"}, {}, {"text_activation": "gelu"}),
    "cleaning": ({}, {"text_cleaning": "lower"}, {}, {"text_cleaning": "canonicalize"}),
    "context": ({}, {"context_length": 77}, {}, {"context_length": 64}),
    "interpolation": ({"interpolation": "bicubic"}, {}, {"interpolation": "bilinear"}, {}),
    "normalisation": ({"mean": [0.5] * 3}, {}, {"mean": [0.48] * 3}, {}),
    "size": ({"size": [32, 32]}, {}, {"size": [32, 32], "resize_to": [40, 40]}, {}),
}


@pytest.mark.parametrize("name", DECLARED)
def test_declared_settings_that_differ_leave_agreeing_probes_unverified(name):
    images, settings, other_images, other_settings = DECLARED[name]
    ours = EmbeddingSpace("a", 32, images, probe(), settings=settings)
    theirs = EmbeddingSpace("b", 32, other_images, probe(), settings=other_settings)
    for first, second in ((ours, theirs), (theirs, EmbeddingSpace.from_dict(ours.to_dict()))):
        found = first.compare(second)
        assert (found.state, found.same, found.verified) == ("unverified", True, False)
        with pytest.warns(UnverifiedSpaceWarning, match="probes agree .* but declared settings differ: "):
            first.require(second, "x")
    assert ours.compare(EmbeddingSpace("c", 32, {}, probe())).state == "same"  # it declares nothing
    assert ours.compare(EmbeddingSpace("a", 32, images, probe(seed=1), settings=settings)).state == "other"


def test_settings_that_differ_by_rounding_are_the_same():
    ours = EmbeddingSpace("a", 32, {"mean": [0.48145466]}, probe(), settings={"context_length": 77})
    theirs = EmbeddingSpace("a", 32, {"mean": (0.481455,)}, probe(), settings={"context_length": 77})
    assert ours.compare(theirs).state == "same"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("dim", each) for each in (None, "8", 1.5, -1, 2**40, True)],
        *[("probe", each) for each in (7, "ä", "AAA", "AAAA", "////" * 128)],
        *[("model", None), ("model", "\ud83d"), ("revision", 7), ("normalisation", None)],
        *[("preprocessing", [1]), ("settings", "none")],
    ],
)
def test_malformed_json_is_one_error(key, value):
    saved = make_space(dim=8).to_dict() | {key: value}
    with pytest.raises(DataError, match=key):
        EmbeddingSpace.from_dict(saved)


def test_fuzz_json():
    whole = make_space(dim=4).to_dict() | {"settings": {"text_cleaning": "lower"}}

    @fuzzed
    @given(damaged_json(whole))
    def run(value):
        space = loads_or_refuses(lambda: EmbeddingSpace.from_dict(value))
        if space is not None:
            loads_or_refuses(lambda: make_space(dim=4).compare(space))
            json.dumps(space.to_dict())

    run()
