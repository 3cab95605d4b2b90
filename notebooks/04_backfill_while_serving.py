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
# # Backfill while serving
#
# You will see
#
# - a gallery of which a growing part is embedded again, searched all the while in both parts at once;
# - how much the order matters in which the items are backfilled, and where it stops paying;
# - two threads, one that backfills and one that searches without a pause;
# - items that are added and removed in the middle of it.
#
# Everything is built in and runs on a CPU, in about half a minute. There are no pictures in it: the vectors are those
# of two models whose quality is known.

# %%
import os
import shutil
import threading
import time
import warnings

os.chdir("..")  # paths below start at the root of the project
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, display

import xbt
from xbt.backfill import (
    backfill_curve,
    distance_to_mean_order,
    fastfill_order,
    fit_rehearsed_order,
    oldest_first,
    query_log_order,
    random_order,
    stopping_point,
)
from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.evaluation import best_positive_ranks
from xbt.index import MixedScores, fit_merge
from xbt.report import draw_backfill_curve

# %% [markdown]
# ## An old and a new model
#
# Texts of both; 300 images with captions whose new vectors are known already (the *sample*); and the gallery, 500
# other images with five captions each.

# %%
world = make_vector_world(*WORLDS["much better"], n_corpus=4000, n_support=300, n_test=500)
new_texts, old_texts = world.corpus_new, world.corpus_old
sample, items = xbt.PairVectors(**world.support), xbt.PairVectors(**world.test)
names = [f"photo-{number}" for number in range(len(items))]

# %% [markdown]
# A space is known by the vectors its model gives for 20 fixed inputs. For models of a world of vectors these are the
# first 20 texts; an encoder's `space` comes with it.

# %%
old_space = xbt.EmbeddingSpace("the old model of the world", old_texts.shape[1], probe=old_texts[:20])
new_space = xbt.EmbeddingSpace("the new model of the world", new_texts.shape[1], probe=new_texts[:20])

# %% [markdown]
# ## With your own models
#
# Put your models and files into these lines and uncomment them; all that follows stays as it is. For a real backfill,
# which embeds the images as it goes, `recipes/backfill.py` does all of this.

# %%
# from xbt.data import CaptionSource, PairSource, load_pairs, read_captions
#
# old = xbt.load_encoder("open_clip:ViT-B-32-quickgelu/openai")
# new = xbt.load_encoder("transformers:openai/clip-vit-large-patch14")
# old_space, new_space = old.space, new.space
# captions = list(read_captions(CaptionSource("captions.txt.gz", limit=5000)))
# new_texts, old_texts = new.encode_texts(captions), old.encode_texts(captions)
# flickr = {"source": "dataset_flickr30k.json", "image_root": "flickr30k-images"}
# sides = []
# for split in ("val", "test"):
#     pairs = load_pairs(PairSource(**flickr, split=split))
#     texts, images = pairs.texts, pairs.images
#     sides.append(
#         xbt.PairVectors(
#             new_texts=new.encode_texts(texts),
#             old_texts=old.encode_texts(texts),
#             new_images=new.encode_images(images),
#             old_images=old.encode_images(images),
#             image_of_text=pairs.text_image,
#         )
#     )
# sample, items = sides
# names = pairs.ids

# %% [markdown]
# ## Two parts, two queries
#
# What is not backfilled yet is searched by the new query in the old space, through a projection; what is backfilled,
# by the new query as it is.

# %%
projection = xbt.fit_projection(new_texts, old_texts, pairs=sample)


def to_old(texts: torch.Tensor) -> torch.Tensor:
    """New text vectors in the old space."""
    return projection(texts, "text").detach()


# %% [markdown]
# The scores of the two parts are not comparable. A *merge* puts them on one scale; it is chosen on the
# sample.

# %%
answers = sample.positives("T2I")
merge = fit_merge(
    to_old(sample.new_texts),
    sample.new_texts,
    sample.old_images,
    sample.new_images,
    answers,
    groups=sample.image_of_text,
)
print(merge)

# %% [markdown]
# ## In what order?
#
# Each order knows the old vectors of all items, and of new vectors those of the sample alone. `rehearsed` backfills
# the sample in thought, and looks what the items have in common that gained. Captions stand for a log of queries.

# %%
log_old, log_new = to_old(new_texts), new_texts
rehearsal = fit_rehearsed_order(
    to_old(sample.new_texts),
    sample.new_texts,
    sample.old_images,
    sample.new_images,
    answers,
    merge,
    sample_old=log_old,
    sample_new=log_new,
)

# %%
orders = {
    "random": random_order(len(items)),
    "oldest first": oldest_first(range(len(items))),
    "query log": query_log_order(log_old, items.old_images),
    "distance to mean": distance_to_mean_order(items.old_images),
    "fastfill": fastfill_order(
        items.old_images, sample.old_images, sample.new_images, sample.new_texts, sample.image_of_text
    ),
    "rehearsed": rehearsal.order(items.old_images),
}

# %% [markdown]
# ## The curve
#
# Recall (the mean of R@1, R@5 and R@10) while the gallery is backfilled. It begins where *new/old* is and ends where
# *new/new* is, whatever the order.

# %%
scores = MixedScores(
    to_old(items.new_texts), items.new_texts, items.old_images, items.new_images, items.positives("T2I")
)
curves = {name: backfill_curve(scores, order, merge) for name, order in orders.items()}

# %%
styles = {
    "random": ("#8a8a8a", "-"),
    "oldest first": ("#8a8a8a", ":"),
    "query log": ("#cc79a7", "--"),
    "distance to mean": ("#009e73", "-."),
    "fastfill": ("#e69f00", "--"),
    "rehearsed": ("#0072b2", "-"),
}
figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
for name, curve in curves.items():
    colour, line = styles[name]
    axes.plot(
        [100 * each for each in curve.fractions],
        [100 * each for each in curve.recall],
        color=colour,
        linestyle=line,
        linewidth=2,
        label=f"{name}: area {100 * curve.area:.1f}",
    )
axes.set(xlabel="items backfilled, in percent", ylabel="mean of R@1, R@5 and R@10, in percent")
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# Both ends are what they should be:


# %%
def recall(queries: torch.Tensor, gallery: torch.Tensor) -> float:
    """The mean of R@1, R@5 and R@10, all of one model."""
    ranks = best_positive_ranks(queries, gallery, items.positives("T2I"))
    return sum(float((ranks < k).double().mean()) for k in (1, 5, 10)) / 3


new_old = recall(to_old(items.new_texts), items.old_images)
new_new = recall(items.new_texts, items.new_images)
curve = curves["rehearsed"]
print(f"nothing backfilled: {100 * curve.recall[0]:.2f}; new/old: {100 * new_old:.2f}")
print(f"all backfilled:     {100 * curve.recall[-1]:.2f}; new/new: {100 * new_new:.2f}")

# %% [markdown]
# ## Where does it stop paying?
#
# Where the next 100 items add no more to recall than the standard error of what they add. This new model is so much
# better that every step pays:

# %%
stop = stopping_point(scores, orders["rehearsed"], merge, step=100, groups=items.image_of_text)
print(f"worth backfilling: {stop.items} of {len(items)} items")

# %% [markdown]
# It is another matter with a model that reads better than the old one, but sees no better. Its queries gain without
# any backfill, and there is little more to be had:

# %%
other = make_vector_world(*WORLDS["better texts alone"], n_corpus=4000, n_support=300, n_test=500)
known, pairs = xbt.PairVectors(**other.support), xbt.PairVectors(**other.test)
other_map = xbt.fit_projection(other.corpus_new, other.corpus_old, pairs=known)


def mixed(side: xbt.PairVectors) -> tuple:
    """Queries in both spaces, images of both models, and what answers what."""
    in_old = other_map(side.new_texts, "text").detach()
    return in_old, side.new_texts, side.old_images, side.new_images, side.positives("T2I")


other_merge, other_scores = fit_merge(*mixed(known)), MixedScores(*mixed(pairs))

# %%
far_first = distance_to_mean_order(pairs.old_images)
stop = stopping_point(other_scores, far_first, other_merge, step=100, groups=pairs.image_of_text)
other_curve = backfill_curve(other_scores, far_first, other_merge)
print(f"worth backfilling: {stop.items} of {len(pairs)} items")

# %%
lines = {"mean of R@1, R@5, R@10": other_curve.recall}
share = stop.items / len(pairs)
picture = draw_backfill_curve(other_curve.fractions, lines, "runs/notebooks/stop.png", stop=share)
display(Image(filename=str(picture), width=700))

# %% [markdown]
# ## A gallery that serves meanwhile
#
# On disk, with the old vectors of all items. `begin_part` opens a second part for vectors of the new model.

# %%
shutil.rmtree("runs/notebooks/gallery", ignore_errors=True)
gallery = xbt.Gallery.create("runs/notebooks/gallery", space=old_space, dtype="float32")
gallery.add(items.old_images, names, old_space)
gallery.begin_part(new_space)
print(gallery)

# %% [markdown]
# One search for all queries, in both parts:

# %%
queries = {"old_queries": to_old(items.new_texts), "new_queries": items.new_texts}
spaces = {"old_space": old_space, "new_space": new_space}
wanted = [names[image] for image in items.image_of_text]


def live_recall() -> float:
    """R@1 of all queries, by searching the gallery as it is now."""
    found = gallery.search_mixed(**queries, k=1, merge=merge, **spaces)
    return sum(ids[0] == name for ids, name in zip(found.ids, wanted, strict=True)) / len(wanted)


# %% [markdown]
# A second thread does nothing but search, as a server would, and writes down what it finds.

# %%
served: list[tuple[float, float]] = [(gallery.fraction_backfilled, live_recall())]
done = threading.Event()


def serve() -> None:
    """Searches until the backfill is done."""
    while not done.is_set():
        before, found = gallery.fraction_backfilled, live_recall()
        if gallery.fraction_backfilled == before:  # else it was another gallery at the end than at the start
            served.append((before, found))


server = threading.Thread(target=serve, daemon=True)
server.start()


def wait_for_searches() -> None:
    """Gives the other thread time for two rounds; a real model takes longer than that for 25 pictures."""
    rounds = len(served)
    while len(served) < rounds + 2 and server.is_alive():
        time.sleep(0.01)


# %% [markdown]
# Meanwhile this one backfills, 25 items at a time, until two thirds are done.

# %%
order = orders["rehearsed"].tolist()
two_thirds = 2 * len(order) // 3
for start in range(0, two_thirds, 25):
    rows = order[start : min(start + 25, two_thirds)]
    gallery.backfill(items.new_images[rows], [names[row] for row in rows], space=new_space)
    wait_for_searches()

# %% [markdown]
# ## Added and removed in the middle of it
#
# New photos need new vectors only, and go to the new part at once. What is removed is gone from both parts. The other
# thread goes on searching.

# %%
added = sample.new_images[:3]
gallery.add(added, ["new-photo-0", "new-photo-1", "new-photo-2"], space=new_space)
first_caption = sample.image_of_text.tolist().index(0)
asked = sample.new_texts[first_caption : first_caption + 1]
print(gallery.search_mixed(to_old(asked), asked, k=3, merge=merge, **spaces).ids[0])

# %%
gallery.remove(["new-photo-0"])
print(gallery.search_mixed(to_old(asked), asked, k=3, merge=merge, **spaces).ids[0])
gallery.remove(["new-photo-1", "new-photo-2"])

# %% [markdown]
# ## The rest

# %%
for start in range(two_thirds, len(order), 25):
    rows = order[start : start + 25]
    gallery.backfill(items.new_images[rows], [names[row] for row in rows], space=new_space)
    wait_for_searches()
done.set()
server.join()
served.append((gallery.fraction_backfilled, live_recall()))
print(gallery)

# %% [markdown]
# What the other thread saw, beside what was to be expected:

# %%
expected = backfill_curve(scores, orders["rehearsed"], merge, ks=(1,))
figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
axes.plot(
    [100 * each for each in expected.fractions],
    [100 * each for each in expected.recall],
    color="#0072b2",
    label="expected",
)
axes.plot(
    [100 * fraction for fraction, _ in served],
    [100 * found for _, found in served],
    "o",
    color="#d95f02",
    alpha=0.6,
    label=f"{len(served)} rounds of searching by the other thread",
)
axes.set(xlabel="items backfilled, in percent", ylabel="R@1 in percent")
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# ## Afterwards
#
# The old part has no items left. `compact` drops it, and the gallery is one of the new model alone.

# %%
gallery.compact()
found = gallery.search(items.new_texts, k=1, space=new_space)
print(gallery)
print("damaged files:", gallery.verify())

# %% [markdown]
# ## What to read next
#
# - [Galleries](../docs/galleries.md#two-parts-a-backfill): search, add, remove, backfill, and what a kill leaves behind.
# - [Orders and merges](../docs/methods.md#backfill-orders-and-merges): how each of them works.
# - [A gallery that grows](../README.md#galleries-that-grow-and-are-backfilled-while-they-serve): orders and merges measured
#   on pictures, and what searching costs.
# - [Serving](../docs/serving.md): the same backfill in Qdrant or PostgreSQL.
# - [Upgrade a gallery](01_upgrade_a_gallery.ipynb): the projection that the old part is searched through.
