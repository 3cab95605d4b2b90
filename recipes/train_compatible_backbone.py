"""Train an image backbone that is compatible with an old one (BCT, BT², OCA), or independent of any.

    accelerate launch recipes/train_compatible_backbone.py --config recipes/configs/compatible_folder_old.yaml

A series goes like this: train the old model and the independent new one with --method independent, then the
compatible one with --old runs/.../model and, for bt2, --independent runs/.../model. It is in its turn the old
one of the next version. Vectors of the models that are learned from are made once and kept with the run.
With --test, result.json and report.md tell how well its queries do on the old gallery and on its own.

Any key of the config can be given as a flag, nested ones with dots (--training.epochs 10). A killed run
continues when the same command is given again.

Not supported: gradient accumulation, FSDP, several positive labels per image.
"""

from xbt.config import run_recipe
from xbt.training import CompatibleBackboneConfig, train_compatible_backbone

if __name__ == "__main__":
    run_recipe(train_compatible_backbone, CompatibleBackboneConfig)
