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
# # Upgrade a gallery
#
# You will see
#
# - a gallery that an old CLIP embedded, and how it refuses the queries of a new one;
# - a projection that is fitted to captions alone in a moment, after which the new CLIP finds its way around;
# - a few hundred pictures with captions deciding how far to trust it;
# - the upgraded encoder saved, loaded and measured: no picture of the gallery is embedded again for it.
#
# Everything is built in and runs on a CPU. It takes half a minute after `make demo`, whose two CLIPs are used then,
# and less than two minutes otherwise.

# %%
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

os.chdir("..")  # paths below start at the root of the project
warnings.filterwarnings("ignore", message="IProgress not found")

from IPython.display import Image, Markdown, display

import xbt
from xbt.config import parse_config
from xbt.data import CaptionSource, PairSource, load_pairs, read_captions
from xbt.demo import DemoConfig, train_demo_clips
from xbt.evaluation import format_markdown
from xbt.report import draw_recall_bars

# %% [markdown]
# ## Two CLIPs
#
# The old one has seen little, the new one more, and for longer. They are those of `make demo`, or two that are
# trained here and now, and kept for the other notebooks.

# %%
trained = Path("runs/quickstart")
if not (trained / "new/model").is_dir():
    trained = Path("runs/notebooks")
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        train_demo_clips(parse_config(DemoConfig, ["--config", "notebooks/two_clips.yaml"]))

old = xbt.load_encoder(f"open_clip:local-dir:{trained}/old/model")
new = xbt.load_encoder(f"open_clip:local-dir:{trained}/new/model")

# %% [markdown]
# ## What there is
#
# Captions to fit to, some pictures with captions to choose by, and others to measure on. Neither CLIP was trained on
# any of these pictures.

# %%
captions = list(read_captions(CaptionSource("scenes", limit=10_000, seed=7)))
chosen_by = load_pairs(PairSource("scenes", split="val", limit=300))
measured_on = load_pairs(PairSource("scenes", split="test", limit=600))
print(f"{captions[0]}\n{captions[1]}\n{captions[2]}")

# %% [markdown]
# ## With your own models
#
# Put your models and files into these lines and uncomment them; all that follows stays as it is. Without
# pictures that have captions, [`auto`](../docs/methods.md#auto) has less to go by.

# %%
# old = xbt.load_encoder("open_clip:ViT-B-32-quickgelu/openai")
# new = xbt.load_encoder("transformers:openai/clip-vit-large-patch14")
# captions = list(read_captions(CaptionSource("captions.txt.gz", limit=100_000)))
# flickr = {"source": "dataset_flickr30k.json", "image_root": "flickr30k-images"}
# chosen_by = load_pairs(PairSource(**flickr, split="val", limit=500))
# measured_on = load_pairs(PairSource(**flickr, split="test"))

# %% [markdown]
# ## The gallery
#
# This is what you have already, and what you do not want to make again.

# %%
old_images = old.encode_images(measured_on.images)
gallery = xbt.Gallery.build(old_images, measured_on.ids, old.space)
print(gallery)

# %% [markdown]
# The new CLIP makes other vectors. The gallery notices, and does not answer with nonsense:

# %%
try:
    gallery.search(new.encode_texts(["a red circle"]), k=3, space=new.space)
except xbt.SpaceMismatchError as error:
    print(error)

# %% [markdown]
# ## A projection
#
# Both models read the same captions, and a rotation takes the new vectors to the old ones. No picture is needed.

# %%
new_captions, old_captions = new.encode_texts(captions), old.encode_texts(captions)
rotation = xbt.fit_projection(new_captions, old_captions, new_space=new.space, old_space=old.space)
rotated = xbt.CompatibleEncoder(new, rotation)

# %% [markdown]
# Now the gallery answers. What it stores is the same as before:

# %%
queries = [captions_of_picture[0] for captions_of_picture in measured_on.captions]
found = gallery.search(rotated.encode_texts(queries), k=10, space=rotated.space)
hits = sum(name in names for name, names in zip(measured_on.ids, found.ids, strict=True))
print(f"{hits} of {len(queries)} queries have their picture among the first ten; by luck it would be 10")

# %% [markdown]
# ## Can it be trusted?
#
# A map that was fitted to texts can rank pictures worse than the old model did. A few hundred pictures with captions
# tell. Their old vectors are in the gallery of a real system already.

# %%
pairs = xbt.PairVectors(
    new_texts=new.encode_texts(chosen_by.texts),
    old_texts=old.encode_texts(chosen_by.texts),
    new_images=new.encode_images(chosen_by.images),
    old_images=old.encode_images(chosen_by.images),
    image_of_text=chosen_by.text_image,
)

# %% [markdown]
# With them, `choose_projection` tries several projections and ways to mix their queries with the old ones, and deploys what is
# shown to be better on pictures that it was not fitted to. Where nothing is, the old query stays.

# %%
decision = xbt.choose_projection(
    new_captions, old_captions, pairs=pairs, new_space=new.space, old_space=old.space
)
print(str(decision).split("\n\n")[0])  # print(decision) shows every candidate

# %% [markdown]
# ## The upgraded encoder
#
# It takes the old encoder's place: texts and pictures go in, vectors of the old space come out.

# %%
upgraded = xbt.CompatibleEncoder(new, decision.projection, decision.ensemble, old=old)
upgraded.save_pretrained("runs/notebooks/upgraded")  # or push_to_hub("you/name")
upgraded = xbt.CompatibleEncoder.from_pretrained("runs/notebooks/upgraded")
print(upgraded.space)

# %% [markdown]
# ## What it gains
#
# A cell is named after the model of the queries and the model of the gallery: *new/old* is the upgraded encoder in
# the gallery as it is, *new/new* what embedding everything again would give. T2I: texts look for pictures, I2T the
# reverse.

# %%
report = xbt.evaluate_retrieval(measured_on, old, new, {"rotation": rotated, "auto": upgraded})
display(Markdown(format_markdown(report)))

# %%
display(Image(filename=str(draw_recall_bars(report, "runs/notebooks/recall.png")), width=800))

# %% [markdown]
# ## What to read next
#
# - [Text-to-image search before and after](02_text_to_image_search_before_and_after.ipynb): the same in pictures.
# - [Which projection](03_which_projection.ipynb): why the rotation alone may lose, and what `auto` makes of it.
# - [Backfill while serving](04_backfill_while_serving.ipynb): if the pictures are to be embedded again after all.
# - [The upgrade report](../docs/report.md): one page that says whether to upgrade, from one command.
# - [Serving](../docs/serving.md): Qdrant, PostgreSQL, FAISS as it is; only your query code changes.
# - [Sharing and loading](../docs/hub.md): the upgraded encoder on the Hub.
