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
# # Compatible backbones
#
# You will see
#
# - new models that are trained so that an old gallery understands them (BCT, BT², OCA), side by side in one table;
# - an independent new model with a Procrustes rotation, which costs nothing, in the same table;
# - what BT² gains from extra dimensions;
# - what is worth training when the rotation is free.
#
# Everything is built in and runs on a CPU, in about a minute: small networks learn to tell 40 classes apart, of which
# the old model knows 20.

# %%
import os
import warnings

os.chdir("..")  # paths below start at the root of the project
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import xbt
from xbt.data.synthetic import ClassWorld, make_class_world
from xbt.evaluation import (
    LabelRetrieval,
    bootstrap_interval,
    compatibility_tax,
    evaluate_labels,
    prefix_vectors,
    update_gain,
)
from xbt.heads import (
    BCTHead,
    BCTLoss,
    BT2Head,
    BT2Loss,
    ClassificationLoss,
    CompatibleHead,
    HeadLoss,
    OCAHead,
    OCALoss,
    PlainHead,
    Targets,
    class_prototypes,
    fit_on_vectors,
)

# %% [markdown]
# ## A world of classes
#
# Labelled inputs, of which the old model has seen the first half of the classes alone.

# %%
torch.manual_seed(0)  # heads are drawn when they are made
world = make_class_world(n_classes=40)
old_classes, dim, extra = 20, 64, 16

# %% [markdown]
# ## With your own models
#
# Put your model and data in these lines and uncomment them: a frozen model's vectors take the place of the inputs,
# and all that follows stays as it is. To train whole networks, `recipes/train_compatible_backbone.py` does all of
# this.

# %%
# from xbt.data import LabelledSource, load_labelled
#
# backbone = xbt.load_encoder("open_clip:ViT-B-32-quickgelu/openai")
# train = load_labelled(LabelledSource("cifar100", split="train", limit=10_000))
# test = load_labelled(LabelledSource("cifar100", split="test", limit=2000))
# world = ClassWorld(
#     backbone.encode_images(train.images), train.labels, backbone.encode_images(test.images), test.labels
# )
# old_classes = 50

# %%
classes = int(world.train_labels.max()) + 1
print(
    f"{len(world.train_labels):,} inputs to train on, {len(world.test_labels):,} to test on, {classes} classes"
)

# %% [markdown]
# ## Training one model
#
# A small network, a head on top of it, and the head's loss. Heads and losses are the library's; the network is yours.


# %%
def train(head: CompatibleHead, loss: HeadLoss, targets: Targets, seed: int) -> nn.Module:
    """A small network behind a head, trained on the rows that the targets are of."""
    torch.manual_seed(seed)
    inputs = world.train_inputs[: len(targets.labels)]
    first, second = nn.Linear(inputs.shape[1], 128), nn.Linear(128, 128)
    body = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(128, head.in_dim))
    fit_on_vectors(body, head, loss, inputs, targets, schedule=xbt.heads.EpochSchedule(epochs=20, seed=seed))
    return nn.ModuleDict({"body": body, "head": head}).requires_grad_(False)


def embed(model: nn.Module, inputs: Tensor, space: str = "new") -> Tensor:
    """Unit rows: the model's whole vectors, or those of them that the old gallery understands."""
    return model["head"].embed(model["body"](inputs), space)


# %% [markdown]
# ## The old model, and an independent new one
#
# The new one is trained on all classes, without a thought of the old one.

# %%
known = world.train_labels < old_classes
order = torch.argsort(~known, stable=True)  # what the old model knows comes first
world = ClassWorld(world.train_inputs[order], world.train_labels[order], world.test_inputs, world.test_labels)
labels = world.train_labels

old = train(
    PlainHead(dim, n_classes=old_classes), ClassificationLoss(), Targets(labels[: known.sum()]), seed=1
)
independent = train(PlainHead(dim, n_classes=classes), ClassificationLoss(), Targets(labels), seed=2)

# %% [markdown]
# ## Backward-compatible models
#
# They are shown what the old model makes of the training data, and the mean of each class in its space. BT² is also
# shown the independent model. Weights of the losses are those of the papers, but for BT²'s λ1.

# %%
targets = Targets(labels, old=embed(old, world.train_inputs), new=embed(independent, world.train_inputs))
prototypes = class_prototypes(targets.old, labels, classes)

born = {
    "BCT": (BCTHead(dim, dim, n_classes=classes), BCTLoss(prototypes)),
    "BT²": (BT2Head(dim, dim, extra, n_classes=classes), BT2Loss(prototypes, new_weight=5.0)),
    "OCA": (OCAHead(dim, extra, n_classes=classes), OCALoss(prototypes)),
}
models = {name: train(head, loss, targets, seed=3) for name, (head, loss) in born.items()}

# %% [markdown]
# ## Or a rotation
#
# Procrustes turns the independent model's vectors to the old ones. It is fitted in a moment, and costs the new model
# nothing: its own vectors stay as they are.

# %%
rotation = xbt.fit_projection(targets.new, targets.old)

# %% [markdown]
# ## The table
#
# Every test item looks for the others of its class. *new/old*: new queries in the old gallery; *new/new*: a gallery
# that is embedded again. The criterion is that new/old is above old/old; the update gain is how much of the way to
# the independent model's own gallery it goes; the tax is what new/new has lost against the independent model.

# %%
test, test_labels = world.test_inputs, world.test_labels
numbers = [str(row) for row in range(len(test))]
old_vectors = embed(old, test)


def search_old(queries: Tensor) -> LabelRetrieval:
    """New queries in the old gallery, each without its own item."""
    ids = {"query_ids": numbers, "gallery_ids": numbers}
    return evaluate_labels(queries, test_labels, old_vectors, test_labels, **ids)


# %%
own = embed(independent, test)
cells = {
    "independent": (search_old(prefix_vectors(own, old_vectors)[0]), evaluate_labels(own, test_labels)),
    "Procrustes": (search_old(rotation(own).detach()), evaluate_labels(own, test_labels)),
}
for name, model in models.items():
    cells[name] = search_old(embed(model, test, "old")), evaluate_labels(embed(model, test), test_labels)
old_old = evaluate_labels(old_vectors, test_labels)

# %%
goal = cells["independent"][1].mean_average_precision
least = old_old.mean_average_precision
print(f"mAP, %       new/old  new/new  criterion  update gain   tax\n(old/old)    {100 * least:7.1f}")
for name, (new_old, new_new) in cells.items():
    mixed, pure = new_old.mean_average_precision, new_new.mean_average_precision
    verdict = "met" if mixed > least else "not met"
    reached, tax = update_gain(mixed, least, goal), compatibility_tax(goal, pure)
    print(f"{name:12} {100 * mixed:7.1f}  {100 * pure:7.1f}  {verdict:9}  {reached:11.0%}  {100 * tax:4.1f}")

# %% [markdown]
# The same as a picture. Each interval is a bootstrap over the test items; another training seed moves the points by
# as much again, and [the README](../README.md#backward-compatible-backbones) has five of them.

# %%
figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
axes.axvline(100 * least, color="#8a8a8a", linestyle="--", label="old/old")
for row, found in enumerate(cells.values()):
    for cell, marker, colour, name in zip(
        found, "o^", ("#d95f02", "#2f6db5"), ("new/old", "new/new"), strict=True
    ):
        estimate, low, high = (100 * each for each in bootstrap_interval(cell.average_precisions))
        axes.plot([low, high], [row, row], color=colour)
        axes.plot(estimate, row, marker, color=colour, markersize=8, label=None if row else name)
axes.set_yticks(range(len(cells)), cells)
axes.invert_yaxis()
axes.set(xlabel="mAP in percent, and 95 % interval", xlim=(0, None))
axes.grid(axis="x", alpha=0.3)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## Extra dimensions
#
# Old and new classes compete for space. BT² and OCA add dimensions that the old gallery does not see. How many
# are needed?

# %%
sweep = {}
for count in (0, 4, 16, 32):
    head = BT2Head(dim, dim, count, n_classes=classes)
    model = train(head, BT2Loss(prototypes, new_weight=5.0), targets, seed=3)
    sweep[count] = search_old(embed(model, test, "old")), evaluate_labels(embed(model, test), test_labels)

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for place, (name, marker, colour) in enumerate((("new/old", "o", "#d95f02"), ("new/new", "^", "#2f6db5"))):
    heights = [100 * cells[place].mean_average_precision for cells in sweep.values()]
    axes.plot(list(sweep), heights, marker + "-", color=colour, label=f"BT², {name}", markersize=8)
axes.axhline(100 * goal, color="#2f6db5", linestyle=":", label="independent, new/new")
axes.axhline(100 * least, color="#8a8a8a", linestyle="--", label="old/old")
axes.set(xlabel="extra dimensions", ylabel="mAP in percent", xticks=list(sweep))
axes.grid(alpha=0.3)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# The gallery that is embedded again gains. The old one cannot: what is extra is not compared there.
#
# ## What is worth training?
#
# - **For a single upgrade, nothing.** The rotation of an independent model finds at least as much in the old gallery,
#   and there is no tax to pay. It asks for the vectors of the same items under both models, and that is all.
# - **What training adds** is one vector that serves both galleries, with no map to keep beside the model. In a chain
#   of versions each can then query every earlier gallery; [the
#   README](../README.md#backward-compatible-backbones) measures such chains.
# - **If you do train, add dimensions.** With extra dimensions (BT² and OCA) the tax is smaller than without (BCT).

# %% [markdown]
# ## What to read next
#
# - [Backward-compatible models](../docs/methods.md#backward-compatible-models): what each method computes, and its paper.
# - [Measured](../README.md#backward-compatible-backbones): five seeds, chains of versions, images and CLIPs.
# - [Which projection](03_which_projection.ipynb): the same question for CLIPs, where a rotation alone often fails.
# - [Backfill while serving](04_backfill_while_serving.ipynb): from the old gallery to the new one.
