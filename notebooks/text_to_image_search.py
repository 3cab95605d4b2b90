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
# # Text-to-image search: a new CLIP in an old gallery
#
# You will see a gallery that an old CLIP embedded, searched first with that old CLIP and then with a better one,
# without embedding any picture again. Everything runs on the built-in scenes and on a CPU: in a minute if you have
# run `make demo`, whose two CLIPs are used, and in a few minutes otherwise.

# %%
import contextlib
import io
import os
import warnings
from pathlib import Path

from IPython.display import Image, display

os.chdir("..")  # paths below start at the root of the project
warnings.filterwarnings("ignore", message="IProgress not found")

import xbt
from xbt.config import parse_config
from xbt.data import CaptionSource, PairSource, load_pairs
from xbt.demo import DemoConfig, train_demo_clips
from xbt.evaluation import format_table
from xbt.report import draw_search_comparison
from xbt.training import TextProjectionConfig, TrainArgs, pretrain_text_projection

runs = Path("runs/notebook")
no_progress_bars = contextlib.redirect_stderr(io.StringIO())

# %% [markdown]
# ## Two CLIPs
#
# The old one is small and has seen little; the new one is wider and was trained for longer on more. Neither has seen
# the scenes that the gallery holds.

# %%
with no_progress_bars:
    demo = parse_config(DemoConfig, ["--config", "recipes/configs/quickstart.yaml"])
    old_spec, new_spec = train_demo_clips(demo)

# %% [markdown]
# ## With your own models
#
# Replace the specifications and the sources here. For instance `open_clip:ViT-B-32-quickgelu/openai`,
# `transformers:openai/clip-vit-large-patch14`, `CaptionSource("captions.txt.gz")` and
# `PairSource("dataset_flickr30k.json", image_root="flickr30k-images", split="test")`.

# %%
captions = CaptionSource("scenes", limit=20_000, seed=7)
pictures = load_pairs(PairSource("scenes", split="test", limit=1000))
old, new = xbt.load_encoder(old_spec), xbt.load_encoder(new_spec)

# %% [markdown]
# ## The gallery, embedded by the old CLIP
#
# This is what you already have, and what you do not want to make again.

# %%
gallery = xbt.Gallery.build(old.encode_images(pictures.images), pictures.ids, old.space)
print(gallery)

# %% [markdown]
# The new CLIP speaks another space, and the gallery notices:

# %%
query = pictures.captions[0][0]
try:
    gallery.search(new.encode_texts([query]), k=3, space=new.space)
except xbt.SpaceMismatchError as error:
    print(error)

# %% [markdown]
# ## The projection, from captions alone
#
# Stage 1 embeds the same captions with both text towers and trains the projection on those vectors: no image is
# looked at. It starts from a rotation in closed form and keeps the best step on held-out captions.

# %%
training = TrainArgs(steps=600, batch_size=512, eval_every=100, checkpoint_every=0)
config = TextProjectionConfig(old_spec, new_spec, captions, str(runs / "stage1"), training, overwrite=True)
with no_progress_bars:
    projection = pretrain_text_projection(config)

upgraded = xbt.CompatibleEncoder(new, projection)
upgraded.save_pretrained(runs / "upgraded")
upgraded = xbt.CompatibleEncoder.from_pretrained(runs / "upgraded")

# %% [markdown]
# ## Before and after
#
# The same queries, searched by the old CLIP and by the upgraded one in the old gallery, and by the new CLIP in a
# gallery that was embedded again. A green frame marks the picture that the query describes.

# %%
rows = [3, 57, 122, 219, 301, 444]
queries = [pictures.captions[row][0] for row in rows]
row_of = {name: row for row, name in enumerate(pictures.ids)}
embedded_again = xbt.Gallery.build(new.encode_images(pictures.images), pictures.ids, new.space)

found = {}
for cell, encoder, where in (
    ("old/old", old, gallery),
    ("new/old", upgraded, gallery),
    ("new/new", new, embedded_again),
):
    hits = where.search(encoder.encode_texts(queries), k=4, space=encoder.space)
    found[cell] = [[row_of[name] for name in names] for names in hits.ids]

images = {cell: [[pictures.image(row) for row in hits] for hits in lists] for cell, lists in found.items()}
right = {
    cell: [[row == wanted for row in hits] for hits, wanted in zip(lists, rows, strict=True)]
    for cell, lists in found.items()
}
display(Image(filename=str(draw_search_comparison(queries, images, runs / "search.png", right))))

# %% [markdown]
# ## The numbers behind the pictures

# %%
report = xbt.evaluate_retrieval(pictures, old, new, {"stage 1": upgraded})
print(format_table(report))
