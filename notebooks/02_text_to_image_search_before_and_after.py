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
# # Text-to-image search, before and after
#
# You will see
#
# - the same texts looked for in the same gallery by the old CLIP, by the upgraded one, and after embedding everything
#   again, with the pictures that each of them finds;
# - queries that the upgrade fixes, and queries that it breaks;
# - the numbers behind the pictures.
#
# Everything is built in and runs on a CPU: in half a minute after `make demo`, whose two CLIPs are used then, and in
# less than two minutes otherwise.

# %%
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

os.chdir("..")  # paths below start at the root of the project
warnings.filterwarnings("ignore", message="IProgress not found")

from IPython.display import Image, display

import xbt
from xbt.config import parse_config
from xbt.data import CaptionSource, PairSource, load_pairs
from xbt.demo import DemoConfig, train_demo_clips
from xbt.evaluation import best_positive_ranks, format_table
from xbt.projections import fit_ensemble
from xbt.report import draw_search_comparison
from xbt.training import TextProjectionConfig, TrainArgs, pretrain_text_projection

# %% [markdown]
# ## Two CLIPs
#
# Those of `make demo`, or two that are trained here and now, and kept for the other notebooks. Neither of them has
# seen the pictures below.

# %%
trained = Path("runs/quickstart")
if not (trained / "new/model").is_dir():
    trained = Path("runs/notebooks")
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        train_demo_clips(parse_config(DemoConfig, ["--config", "notebooks/two_clips.yaml"]))

old_spec = f"open_clip:local-dir:{trained}/old/model"
new_spec = f"open_clip:local-dir:{trained}/new/model"

# %%
captions = CaptionSource("scenes", limit=10_000, seed=7)
chosen_by = load_pairs(PairSource("scenes", split="val", limit=300))
pictures = load_pairs(PairSource("scenes", split="test", limit=600))

# %% [markdown]
# ## With your own models
#
# Put your models and files into these lines and uncomment them; all that follows stays as it is.

# %%
# old_spec = "open_clip:ViT-B-32-quickgelu/openai"
# new_spec = "transformers:openai/clip-vit-large-patch14"
# captions = CaptionSource("captions.txt.gz", limit=100_000)
# flickr = {"source": "dataset_flickr30k.json", "image_root": "flickr30k-images"}
# chosen_by = load_pairs(PairSource(**flickr, split="val", limit=500))
# pictures = load_pairs(PairSource(**flickr, split="test"))

# %%
old, new = xbt.load_encoder(old_spec), xbt.load_encoder(new_spec)

# %% [markdown]
# ## The projection, from captions alone
#
# Stage 1 of XBT: both models embed the captions once, and a small network is trained to take the new vectors to the
# old ones. It starts from a rotation, and the best step on held-out captions is kept.

# %%
training = TrainArgs(steps=300, batch_size=512, eval_every=100, checkpoint_every=0)
stage1 = TextProjectionConfig(old_spec, new_spec, captions, "runs/notebooks/stage1", training, overwrite=True)
with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
    projection = pretrain_text_projection(stage1)

# %% [markdown]
# ## How much of the old query to keep
#
# Both queries err, but not in the same places, so that a mixture of them is better than either. How much of each is
# chosen on 300 other pictures.

# %%
pairs = xbt.PairVectors(
    new_texts=new.encode_texts(chosen_by.texts),
    old_texts=old.encode_texts(chosen_by.texts),
    new_images=new.encode_images(chosen_by.images),
    old_images=old.encode_images(chosen_by.images),
    image_of_text=chosen_by.text_image,
)
ensemble = fit_ensemble(pairs, projection).ensemble
upgraded = xbt.CompatibleEncoder(new, projection, ensemble, old=old)
print({direction: str(mixture) for direction, mixture in ensemble.directions.items()})

# %% [markdown]
# ## Three ways to search
#
# Before; after; and what embedding every picture again would give.

# %%
gallery = xbt.Gallery.build(old.encode_images(pictures.images), pictures.ids, old.space)
embedded_again = xbt.Gallery.build(new.encode_images(pictures.images), pictures.ids, new.space)
ways = {"old/old": (old, gallery), "new/old": (upgraded, gallery), "new/new": (new, embedded_again)}

# %%
row_of = {name: row for row, name in enumerate(pictures.ids)}


def show(rows: list[int], title: str) -> None:
    """Draws what each way finds for the first caption of some pictures."""
    queries = [pictures.captions[row][0] for row in rows]
    images, right = {}, {}
    for cell, (encoder, where) in ways.items():
        found = where.search(encoder.encode_texts(queries), k=4, space=encoder.space).ids
        images[cell] = [[pictures.image(row_of[name]) for name in names] for names in found]
        right[cell] = [
            [row_of[name] == row for name in names] for names, row in zip(found, rows, strict=True)
        ]
    path = Path("runs/notebooks") / f"{title}.png"
    display(Image(filename=str(draw_search_comparison(queries, images, path, right, title)), width=900))


# %% [markdown]
# ## Queries as they come
#
# Nobody picked these: the first captions of pictures at equal distances. A green frame marks the picture that is
# meant.

# %%
show(list(range(0, len(pictures), len(pictures) // 5))[:5], "Queries as they come")

# %% [markdown]
# ## Fixed, and broken
#
# The place of the right picture for every query, before and after. An upgrade is an exchange: it brings some pictures
# to the first place and pushes others from it.

# %%
first = [captions[0] for captions in pictures.captions]
answers = [[row] for row in range(len(pictures))]
place = {
    cell: best_positive_ranks(encoder.encode_texts(first), where.vectors(pictures.ids), answers)
    for cell, (encoder, where) in ways.items()
}
fixed = ((place["old/old"] > 0) & (place["new/old"] == 0)).nonzero().flatten().tolist()
broken = ((place["old/old"] == 0) & (place["new/old"] > 0)).nonzero().flatten().tolist()
print(
    f"of {len(first)} queries, {len(fixed)} find their picture only after the upgrade, {len(broken)} only before"
)

# %%
show(fixed[:3], "Fixed by the upgrade")

# %%
show(broken[:3], "Broken by the upgrade")

# %% [markdown]
# ## The numbers behind the pictures
#
# With every caption, and in both directions. The last lines count the queries fixed and broken.

# %%
report = xbt.evaluate_retrieval(pictures, old, new, {"upgraded": upgraded})
print(format_table(report))

# %% [markdown]
# ## What to read next
#
# - [Upgrade a gallery](01_upgrade_a_gallery.ipynb): the same steps one by one, without training a projection.
# - [Which projection](03_which_projection.ipynb): all of them side by side, with error bars.
# - [Backfill while serving](04_backfill_while_serving.ipynb): from *new/old* to *new/new*, picture by picture.
# - [Stage 1 and stage 2](../docs/methods.md#stage-1-and-stage-2-xbt): what was trained here, and LoRA on top of it.
# - [Evaluation](../docs/evaluation.md): what R@k is here, and how to check it.
