"""Encoding without padding against calling the libraries at the full context."""

from __future__ import annotations

import random
import warnings

import pytest
import tiny
import torch
from torch.nn.functional import normalize

from xbt.compatible import CompatibleEncoder
from xbt.encoders import LoraSettings, add_lora, load_encoder, load_lora, save_lora, text_batching
from xbt.encoders.hf_transformers import LEGACY_EOS, pooled
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.encoders.text_batching import ShortContext, _full_precision, batches_by_length
from xbt.errors import DataError, TruncationWarning
from xbt.projections import fit_projection

TEXTS = [
    "a red circle",
    "",
    "dog",
    "two dogs & a cat!! to the left of a very large blue star",
    "!!!",
    "naïve café ☕ 数字",
    "<end_of_text> dog",
    "<|endoftext|>",
    "a " * 100,
    "dog cat " * 12,
]

CUTTABLE = {
    "open_clip": lambda d: tiny.tiny_open_clip(d),
    "custom_text": lambda d: tiny.tiny_open_clip(d, custom_text=True),
    "transformers": lambda d: tiny.tiny_transformers_clip(d, context_length=40),
    "legacy eos": lambda d: tiny.tiny_transformers_clip(d, context_length=40, eos_token_id=LEGACY_EOS),
}


def open_clip_text(**options):
    """An open_clip model with other text options than CLIP's."""
    config = tiny.open_clip_config(custom_text=True)
    config["text_cfg"] |= options
    encoder = OpenClipEncoder.create(config)
    encoder.module.eval()
    return encoder


def roberta(directory):
    """open_clip's wrapper of a Hugging Face text model, which masks its padding."""
    from transformers import RobertaConfig

    tiny.tiny_siglip(directory / "tokenizer", layers=1)
    RobertaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=80, pad_token_id=0, bos_token_id=1, eos_token_id=1, type_vocab_size=1,
    ).save_pretrained(directory / "text")  # fmt: skip
    config = tiny.open_clip_config(custom_text=True)
    config["text_cfg"] = {
        "hf_model_name": str(directory / "text"),
        "hf_tokenizer_name": str(directory / "tokenizer"),
        "hf_pooler_type": "mean_pooler",
        "context_length": 70,
    }
    encoder = OpenClipEncoder.create(config)
    encoder.module.eval()
    return encoder


@torch.no_grad()
def at_full_context(encoder, texts, module=None):
    """What the library itself gives for rows of the whole context."""
    module = encoder.module if module is None else module
    if isinstance(encoder, OpenClipEncoder):
        return module.encode_text(encoder.tokenizer(texts), normalize=True)
    tokens = encoder.tokenizer(
        texts, padding="max_length", truncation=True, max_length=encoder.context_length, return_tensors="pt"
    )
    return normalize(pooled(module.get_text_features(input_ids=tokens["input_ids"])), dim=-1)


def encode(encoder, texts, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        return encoder.encode_texts(texts, **options)


def widths(encoder, monkeypatch):
    """The shape of the tokens of every forward pass from now on."""
    seen, original = [], encoder._text_features
    monkeypatch.setattr(encoder, "_text_features", lambda t: seen.append(tuple(t.shape)) or original(t))
    return seen


@pytest.fixture(params=CUTTABLE)
def encoder(request, tmp_path):
    return load_encoder(CUTTABLE[request.param](tmp_path))


def test_parity_with_the_libraries_at_full_context(encoder, monkeypatch):
    expected = at_full_context(encoder, TEXTS)
    assert encoder.short_context is not None
    seen = widths(encoder, monkeypatch)
    torch.testing.assert_close(encode(encoder, TEXTS, batch_size=3), expected, rtol=0, atol=1e-5)
    assert seen[0] == (3, encoder.context_length)  # the text that was cut comes first
    assert [width for _, width in seen] == sorted((width for _, width in seen), reverse=True)
    assert seen[-1][1] < encoder.context_length / 2


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_order_duplicates_and_batch_size_do_not_matter(encoder, batch_size, monkeypatch):
    texts = TEXTS * 3
    random.Random(0).shuffle(texts)
    expected = at_full_context(encoder, texts)
    _ = encoder.short_context
    seen = widths(encoder, monkeypatch)
    torch.testing.assert_close(encode(encoder, texts, batch_size=batch_size), expected, rtol=0, atol=1e-5)
    assert sum(rows for rows, _ in seen) == len(TEXTS)
    assert max(rows for rows, _ in seen) <= batch_size


@pytest.mark.parametrize("text", TEXTS)
def test_one_text(encoder, text):
    torch.testing.assert_close(encode(encoder, [text]), at_full_context(encoder, [text]), rtol=0, atol=1e-5)


def test_cut_texts_are_counted_with_their_duplicates(encoder):
    long = "dog " * 50
    with pytest.warns(TruncationWarning, match="3 of 6 texts are longer than the") as caught:
        encoder.encode_texts([long, "a", long, "a", "two", long], batch_size=2)
    assert len(caught) == 1


def test_workers_tokenise_with_the_same_result(encoder):
    texts = [f"{text} {number}" for number in range(60) for text in TEXTS] * 2
    assert torch.equal(encode(encoder, texts, num_workers=2), encode(encoder, texts))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_texts_than_one_window(encoder, num_workers, monkeypatch):
    monkeypatch.setattr(text_batching, "CHUNK", 2)
    monkeypatch.setattr(text_batching, "WINDOW", 4)
    expected = at_full_context(encoder, TEXTS)
    vectors = encode(encoder, TEXTS, num_workers=num_workers)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)


def test_a_masked_text_model(tmp_path, monkeypatch):
    encoder = roberta(tmp_path)
    assert encoder.short_context == ShortContext(pad=0, keep=0)
    expected = at_full_context(encoder, TEXTS)
    seen = widths(encoder, monkeypatch)
    torch.testing.assert_close(encode(encoder, TEXTS, batch_size=3), expected, rtol=0, atol=1e-5)
    assert seen[-1][1] < 20


@pytest.mark.parametrize(
    "options",
    [
        {"no_causal_mask": True},
        {"no_causal_mask": True, "pool_type": "last"},
        {"pool_type": "last"},
        {"embed_cls": True, "pad_id": 0},
    ],
    ids=str,
)
def test_open_clip_towers_that_see_their_padding_run_in_full(options, monkeypatch):
    encoder = open_clip_text(**options)
    assert encoder.short_context is None
    seen = widths(encoder, monkeypatch)
    assert torch.equal(
        encode(encoder, TEXTS, batch_size=4),
        torch.cat([at_full_context(encoder, TEXTS[start : start + 4]) for start in (0, 4, 8)]),
    )
    assert {width for _, width in seen} == {encoder.context_length}


def test_siglip_runs_in_full(tmp_path, monkeypatch):
    encoder = load_encoder(tiny.tiny_siglip(tmp_path))
    assert encoder.short_context is None
    seen = widths(encoder, monkeypatch)
    torch.testing.assert_close(encode(encoder, TEXTS), at_full_context(encoder, TEXTS), rtol=0, atol=1e-6)
    assert {width for _, width in seen} == {encoder.context_length}


def with_random_lora(encoder):
    add_lora(encoder, LoraSettings(rank=2))
    torch.manual_seed(3)
    for name, parameter in encoder.module.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.2)
    encoder.invalidate_space()


def test_lora_merged_and_unmerged(encoder, tmp_path):
    plain = at_full_context(encoder, TEXTS)
    with_random_lora(encoder)
    assert encoder.short_context is not None
    expected = at_full_context(encoder, TEXTS, encoder.module.get_base_model())
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(encode(encoder, TEXTS), expected, rtol=0, atol=1e-5)
    save_lora(encoder, tmp_path / "lora")
    merged = load_encoder(encoder.name)
    load_lora(merged, tmp_path / "lora", merge=True)
    torch.testing.assert_close(encode(merged, TEXTS), expected, rtol=0, atol=1e-5)


def test_behind_a_compatible_encoder(encoder, tmp_path, monkeypatch):
    old = load_encoder(tiny.tiny_open_clip(tmp_path / "old", seed=7))
    words = [f"{a} {b}" for a in tiny.WORDS.split() for b in ("dog", "cat")]
    projection = fit_projection(
        encoder.encode_texts(words), old.encode_texts(words), new_space=encoder.space, old_space=old.space
    )
    compatible = CompatibleEncoder(encoder, projection)
    expected = projection(at_full_context(encoder, TEXTS)).detach()
    seen = widths(encoder, monkeypatch)
    torch.testing.assert_close(encode(compatible, TEXTS, batch_size=3), expected, rtol=0, atol=1e-5)
    assert seen[-1][1] < encoder.context_length / 2
    torch.testing.assert_close(
        compatible.embed_tokens(encoder.tokenize(["dog"])).detach(),
        projection(at_full_context(encoder, ["dog"])).detach(),
        rtol=0,
        atol=1e-5,
    )
    assert seen[-1][1] < encoder.context_length / 2


def gradients(encoder, vectors):
    encoder.module.zero_grad()
    weights = torch.linspace(-1, 1, vectors.numel()).reshape(vectors.shape)
    (vectors * weights).sum().backward()
    return {name: p.grad.clone() for name, p in encoder.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
def test_training_on_cut_tokens_gives_the_same_gradients(encoder, lora, monkeypatch):
    encoder.module.requires_grad_(True)
    if lora:
        with_random_lora(encoder)
    encoder.module.train()
    tokens = encoder.tokenize(["a red circle", "", "two dogs & a cat"])
    whole = gradients(encoder, encoder._embed_whole(tokens))
    seen = widths(encoder, monkeypatch)
    short = gradients(encoder, encoder.embed_tokens(tokens))
    assert seen[-1][1] < encoder.context_length / 2
    assert encoder.module.training
    assert short.keys() == whole.keys()
    assert len(whole) > 5
    for name, gradient in whole.items():
        torch.testing.assert_close(short[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_shorter_tokens_can_be_given(encoder):
    tokens = encoder.tokenize(["a red circle", "dog"])
    short = encoder.short_context.cut(tokens)
    assert short.shape[1] < tokens.shape[1]
    assert torch.equal(encoder.embed_tokens(short), encoder.embed_tokens(tokens))


def test_the_model_is_not_touched(encoder):
    before = {name: (id(p), p._version) for name, p in encoder.module.named_parameters()}
    keys = list(encoder.module.state_dict())
    encode(encoder, TEXTS)
    assert {name: (id(p), p._version) for name, p in encoder.module.named_parameters()} == before
    assert list(encoder.module.state_dict()) == keys
    torch.testing.assert_close(encode(encoder, TEXTS), at_full_context(encoder, TEXTS), rtol=0, atol=1e-5)


def test_the_short_context_is_cached_until_the_weights_change(encoder, monkeypatch):
    found = encoder.short_context
    seen = widths(encoder, monkeypatch)
    assert encoder.short_context is found
    assert not seen
    encoder.invalidate_space()
    assert encoder.short_context == found
    assert seen


def test_a_tower_that_refuses_shorter_rows_runs_in_full(encoder, monkeypatch):
    original = encoder._text_features

    def stubborn(tokens):
        if tokens.shape[1] != encoder.context_length:
            raise ValueError("77 tokens or none")
        return original(tokens)

    monkeypatch.setattr(encoder, "_text_features", stubborn)
    assert encoder.short_context is None
    torch.testing.assert_close(encode(encoder, TEXTS), at_full_context(encoder, TEXTS), rtol=0, atol=1e-5)


def test_nan_names_the_first_text_in_the_users_order(encoder, monkeypatch):
    original, bad = encoder._text_features, encoder.tokenize(["two dogs"])[0, :3]
    _ = encoder.short_context

    def broken(tokens):
        features = original(tokens)
        features[(tokens[:, :3] == bad).all(dim=1)] = float("nan")
        return features

    monkeypatch.setattr(encoder, "_text_features", broken)
    texts = ["dog", "a red circle", "dog", "two dogs & a cat", "blue", "two dogs & a cat with a star"]
    with pytest.raises(DataError, match="NaN for text number 3;"):
        encoder.encode_texts(texts, batch_size=1)


def test_lengths_by_hand():
    own_end = torch.tensor([[8, 5, 9, 9, 9], [8, 9, 9, 9, 9], [8, 9, 5, 9, 9], [8, 5, 6, 7, 9]])
    assert ShortContext(pad=9, keep=1).lengths(own_end).tolist() == [3, 2, 4, 5]
    zeros = torch.tensor([[8, 5, 9, 0, 0], [8, 9, 0, 0, 0], [8, 0, 9, 0, 0], [8, 5, 6, 7, 9], [0] * 5])
    assert ShortContext(pad=0, keep=0).lengths(zeros).tolist() == [3, 2, 3, 5, 1]
    assert ShortContext(pad=0, keep=0).cut(zeros[:3], multiple=4).shape == (3, 4)
    assert ShortContext(pad=0, keep=0).cut(zeros[:0]).shape == (0, 5)


def test_batches_hold_no_more_tokens_than_full_ones_would():
    lengths = torch.tensor([3, 20, 5, 9, 2, 2, 30, 8])
    tokens = (torch.arange(32) < lengths[:, None]).long()
    batches = list(batches_by_length(tokens, ShortContext(0, 0), batch_size=1, multiple=8, fill=True))
    assert [tuple(batch.tokens.shape) for batch in batches] == [(1, 32), (1, 24), (2, 16), (4, 8)]
    assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(8))
    for batch in batches:
        assert torch.equal(batch.tokens, tokens[batch.rows, : batch.tokens.shape[1]])
        assert not tokens[batch.rows, batch.tokens.shape[1] :].any()


def test_rows_of_about_the_same_length_stay_together():
    lengths = torch.tensor([20] * 20 + [19] * 3 + [10] * 30 + [3] * 2)
    tokens = (torch.arange(32) < lengths[:, None]).long()
    shapes = [tuple(b.tokens.shape) for b in batches_by_length(tokens, ShortContext(0, 0), batch_size=28)]
    assert shapes == [(23, 20), (28, 10), (4, 10)]
    shapes = [tuple(b.tokens.shape) for b in batches_by_length(tokens, ShortContext(0, 0), batch_size=8)]
    assert shapes == [(8, 20), (8, 20), (8, 20), (8, 10), (8, 10), (8, 10), (7, 10)]


@pytest.mark.parametrize("set_up", ["fp32_precision", "allow_tf32"])
def test_tf32_is_off_while_towers_are_compared(set_up):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, set_up):
        pytest.skip("this torch has only the older switch")
    before = getattr(matmul, set_up)
    setattr(matmul, set_up, "tf32" if set_up == "fp32_precision" else True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # autocast for a GPU that is not there
            with _full_precision(torch.device("cuda")):
                assert getattr(matmul, "fp32_precision", "ieee") == "ieee"
        assert getattr(matmul, set_up) in ("tf32", True)
    finally:
        setattr(matmul, set_up, before)
