# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which projection, and whether at all
#
# You will see
#
# - every method of `fit_projection` on one pair of models, with error bars, and most of them below the old query;
# - what mixing with the old query changes, and what `auto` makes of it, on five pairs of models of known quality;
# - a new model that is worse than the old one: Procrustes breaks the search, and `auto` falls back to the old query;
# - the same on pictures, with two small CLIPs.
#
# Everything is built in and runs on a CPU, in about a minute, and in less than two if the two CLIPs have to be
# trained.

# %%
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

os.chdir("..")  # paths below start at the root of the project
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
from torch import Tensor

import xbt
from xbt.config import parse_config
from xbt.data import CaptionSource, ImageTextPairs, PairSource, load_pairs, read_captions
from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.demo import DemoConfig, train_demo_clips
from xbt.evaluation import Interval, best_positive_ranks, bootstrap_interval, compare_ranks
from xbt.projections import Decision, fit_ensemble
from xbt.projections.fitting import METHODS

BLUE, ORANGE, GREY = "#2f6db5", "#d95f02", "#8a8a8a"

# %% [markdown]
# ## A world of vectors
#
# Two dual encoders without pictures or training: how well each of them sees is set by hand, so it is known which of
# them ought to win. There are texts to fit to, pairs to choose by, and other pairs to measure on.


# %%
def draw_world(name: str) -> tuple[Tensor, Tensor, xbt.PairVectors, xbt.PairVectors]:
    """Texts under the new and the old model, pairs to choose by, pairs to measure on."""
    world = make_vector_world(*WORLDS[name], n_corpus=4000, n_support=300, n_test=500)
    return world.corpus_new, world.corpus_old, xbt.PairVectors(**world.support), xbt.PairVectors(**world.test)


new_texts, old_texts, chosen_by, measured_on = draw_world("little better")
print(f"{len(new_texts):,} texts; {len(chosen_by)} pairs to choose by; {len(measured_on)} to measure on")

# %% [markdown]
# ## Every method
#
# All of them see the same texts. The three that are trained are trained briefly here. A query is what a projection
# makes of a new vector.

# %%
briefly = {method: {"steps": 200, "batch_size": 512} for method in ("lambda_orthogonal", "mlp", "xbt")}


def fit_all(new_texts: Tensor, old_texts: Tensor) -> dict[str, xbt.Projection]:
    """Every method, fitted to texts alone."""
    return {name: xbt.fit_projection(new_texts, old_texts, name, **briefly.get(name, {})) for name in METHODS}


# %% [markdown]
# An *ensemble* mixes it with the old model's vector of the same query.


# %%
def queries_of(
    projection: xbt.Projection, pairs: xbt.PairVectors, ensemble: xbt.QueryEnsemble | None = None
) -> dict[str, Tensor]:
    """By direction: the vectors to search the old gallery with."""
    found = {}
    for direction, modality in (("T2I", "text"), ("I2T", "image")):
        new, old = pairs.queries(direction)
        projected = projection.project(new, modality).detach()
        found[direction] = projected if ensemble is None else ensemble(old, projected, direction)
    return found


# %% [markdown]
# It takes half of each, or the share that does best on the pairs to choose by. `auto` chooses projection and mixture,
# and whether to use them at all.


# %%
def contend(
    new_texts: Tensor, old_texts: Tensor, chosen_by: xbt.PairVectors, measured_on: xbt.PairVectors
) -> tuple[dict[str, dict[str, Tensor]], Decision]:
    """Queries of every method, of the ensembles and of `auto`; and what `auto` decided."""
    projections = fit_all(new_texts, old_texts)
    rotation = projections["procrustes"]
    half, fitted = xbt.QueryEnsemble.midpoint(rotation.old_dim), fit_ensemble(chosen_by, rotation).ensemble
    decision = xbt.choose_projection(new_texts, old_texts, pairs=chosen_by)
    contenders = {name: queries_of(projection, measured_on) for name, projection in projections.items()}
    contenders["procrustes + half old"] = queries_of(rotation, measured_on, half)
    contenders["procrustes + fitted ensemble"] = queries_of(rotation, measured_on, fitted)
    contenders["auto"] = queries_of(decision.projection, measured_on, decision.ensemble)
    return contenders, decision


contenders, decision = contend(new_texts, old_texts, chosen_by, measured_on)

# %% [markdown]
# ## How good are they?
#
# R@1 is the share of queries whose right answer comes first. Its interval is a bootstrap over the pictures.


# %%
def ranks(vectors: Tensor, pairs: xbt.PairVectors, direction: str) -> Tensor:
    """The place of every query's right answer in the old gallery, from 0."""
    return best_positive_ranks(vectors, pairs.gallery(direction), pairs.positives(direction))


def recall_at_1(vectors: Tensor, pairs: xbt.PairVectors, direction: str) -> Interval:
    """R@1 in the old gallery, with its 95 % interval."""
    return bootstrap_interval(ranks(vectors, pairs, direction) < 1, pairs.groups(direction))


# %%
titles = {"T2I": "texts look for images", "I2T": "images look for texts"}


def draw_contenders(contenders: dict[str, dict[str, Tensor]], pairs: xbt.PairVectors) -> None:
    """R@1 of every contender: a blue circle above the old query, an orange cross at or below it."""
    size = (10, 0.36 * len(contenders) + 1.5)
    figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axes, direction in zip(panels, titles, strict=True):
        old = recall_at_1(pairs.queries(direction)[1], pairs, direction)
        axes.axvspan(100 * old.low, 100 * old.high, color=GREY, alpha=0.25, linewidth=0)
        label = "old query" if axes is panels[0] else None
        axes.axvline(100 * old.estimate, color=GREY, label=label)
        for row, found in enumerate(contenders.values()):
            estimate, low, high = (100 * each for each in recall_at_1(found[direction], pairs, direction))
            better = estimate > 100 * old.estimate
            axes.plot([low, high], [row, row], color=BLUE if better else ORANGE)
            axes.plot(estimate, row, "o" if better else "X", color=BLUE if better else ORANGE, markersize=7)
        axes.set(title=f"{direction}: {titles[direction]}", xlabel="R@1 in percent, and 95 % interval")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(contenders)), contenders)
    panels[0].invert_yaxis()
    figure.legend(loc="outside lower center")
    plt.show()


draw_contenders(contenders, measured_on)

# %% [markdown]
# The grey band is the old query, which a new one has to beat: blue circles do, orange crosses do not. The maps alone
# are fitted to texts, and what they lose on the way is more than this new model is better by. Mixtures are another
# matter, because both queries seldom err together.
#
# ## Five pairs of models
#
# From a new model that is much better than the old one to one that is worse. What counts is the gain over the old
# query, whose interval is taken of the paired differences.


# %%
def gain(vectors: Tensor, pairs: xbt.PairVectors, direction: str) -> Interval:
    """R@1 minus that of the old query, with its 95 % interval."""
    old = ranks(pairs.queries(direction)[1], pairs, direction)
    return compare_ranks(ranks(vectors, pairs, direction), old, 1, pairs.groups(direction)).gain


# %%
rules = {"procrustes": ("X", ORANGE), "procrustes + half old": ("s", GREY), "auto": ("o", BLUE)}
gains, decisions = {}, {}
for name in WORLDS:
    new_side, old_side, support, test = draw_world(name)
    rotation = xbt.fit_projection(new_side, old_side)
    half = xbt.QueryEnsemble.midpoint(rotation.old_dim)
    decisions[name] = xbt.choose_projection(new_side, old_side, pairs=support)
    queries = {
        "procrustes": queries_of(rotation, test),
        "procrustes + half old": queries_of(rotation, test, half),
        "auto": queries_of(decisions[name].projection, test, decisions[name].ensemble),
    }
    gains[name] = {(rule, way): gain(queries[rule][way], test, way) for rule in rules for way in titles}

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
for axes, direction in zip(panels, titles, strict=True):
    axes.axvline(0, color="black", linewidth=1)
    for shift, (rule, (marker, colour)) in zip((-0.22, 0, 0.22), rules.items(), strict=True):
        for row, name in enumerate(WORLDS):
            estimate, low, high = (100 * each for each in gains[name][rule, direction])
            axes.plot([low, high], [row + shift] * 2, color=colour)
            label = rule if row == 0 and axes is panels[0] else None
            axes.plot(estimate, row + shift, marker, color=colour, markersize=7, label=label)
    axes.set(title=f"{direction}: {titles[direction]}", xlabel="R@1 minus that of the old query, in points")
    axes.grid(axis="x", alpha=0.3)
panels[0].set_yticks(range(len(WORLDS)), [f"new model\n{name}" for name in WORLDS])
panels[0].invert_yaxis()
figure.legend(loc="outside lower center", ncols=len(rules))
plt.show()

# %% [markdown]
# The criterion of an upgrade is that it lies to the right of the line. How often does each rule lie to its left?

# %%
for rule in rules:
    worse = [
        cell
        for found in gains.values()
        for (name, _), cell in found.items()
        if name == rule and cell.estimate < 0
    ]
    print(f"{rule}: worse than the old query in {len(worse)} of {len(WORLDS) * len(titles)} cases")

# %% [markdown]
# ## Where Procrustes fails the criterion
#
# The last pair is an upgrade that should not be made: the rotation fails by far. A mixture may still gain a little,
# as two models seldom fail together, but it needs both of them at search time. If the old model may not run any
# more (`use_old=False`), nothing beats the old query, and `auto` says so:

# %%
new_side, old_side, support, test = draw_world("worse")
fallback = xbt.choose_projection(new_side, old_side, pairs=support, use_old=False)
print(str(fallback).split("\n\n")[0])

# %%
for way in titles:
    kept = gain(fallback.queries(test.queries(way)[0], test.queries(way)[1], way), test, way)
    print(f"{way}: procrustes {gains['worse']['procrustes', way]} points over the old query, auto {kept}")

# %% [markdown]
# ## On pictures
#
# The two small CLIPs of `make demo`, or two that are trained here and now, and the built-in scenes.

# %%
trained = Path("runs/quickstart")
if not (trained / "new/model").is_dir():
    trained = Path("runs/notebooks")
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        train_demo_clips(parse_config(DemoConfig, ["--config", "notebooks/two_clips.yaml"]))

# %%
old = xbt.load_encoder(f"open_clip:local-dir:{trained}/old/model")
new = xbt.load_encoder(f"open_clip:local-dir:{trained}/new/model")
captions = list(read_captions(CaptionSource("scenes", limit=4000, seed=7)))
choosing = load_pairs(PairSource("scenes", split="val", limit=300))
measuring = load_pairs(PairSource("scenes", split="test", limit=500))

# %% [markdown]
# ## With your own models
#
# Put your models and files into these lines and uncomment them; all that follows is then about your upgrade.

# %%
# old = xbt.load_encoder("open_clip:ViT-B-32-quickgelu/openai")
# new = xbt.load_encoder("transformers:openai/clip-vit-large-patch14")
# captions = list(read_captions(CaptionSource("captions.txt.gz", limit=100_000)))
# flickr = {"source": "dataset_flickr30k.json", "image_root": "flickr30k-images"}
# choosing = load_pairs(PairSource(**flickr, split="val", limit=500))
# measuring = load_pairs(PairSource(**flickr, split="test"))


# %%
def embed(pairs: ImageTextPairs) -> xbt.PairVectors:
    """Pictures and captions under both models."""
    return xbt.PairVectors(
        new_texts=new.encode_texts(pairs.texts),
        old_texts=old.encode_texts(pairs.texts),
        new_images=new.encode_images(pairs.images),
        old_images=old.encode_images(pairs.images),
        image_of_text=pairs.text_image,
    )


new_texts, old_texts = new.encode_texts(captions), old.encode_texts(captions)
chosen_by, measured_on = embed(choosing), embed(measuring)

# %%
contenders, decision = contend(new_texts, old_texts, chosen_by, measured_on)
draw_contenders(contenders, measured_on)

# %% [markdown]
# What `auto` decided, and why:

# %%
print(str(decision).split("\n\n")[0])  # print(decision) shows every candidate
for direction in titles:
    print(
        f"{direction}: auto {gain(contenders['auto'][direction], measured_on, direction)} points over the old query"
    )

# %% [markdown]
# ## What to read next
#
# - [Methods](../docs/methods.md#projections): the formula of each, where it comes from, and when it wins.
# - [How they compare](../README.md#how-they-compare): over many seeds, on Flickr8k and with real CLIPs.
# - [Upgrade a gallery](01_upgrade_a_gallery.ipynb): what to do with a decision.
# - [Compatible backbones](05_compatible_backbones.ipynb): train the new model so that it needs no projection.
