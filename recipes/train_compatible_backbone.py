"""Train an image backbone that is compatible with an old one (BCT, BT², OCA), or independent of any.

    accelerate launch recipes/train_compatible_backbone.py --config recipes/configs/compatible_folder_old.yaml

For a series of versions, train the old model and the independent new one with --method independent, then the
compatible one with --old runs/.../model and, for bt2, --independent runs/.../model. It is the old model of
the next version. The vectors of the teacher models are computed once and kept with the run. With --test,
result.json and report.md hold the results of its queries on the old gallery and on its own.

Any key of the config can be given as a flag, nested ones with dots (--training.epochs 10). A killed run
continues with the same command.

Not supported: gradient accumulation, FSDP, several positive labels per image.
"""

from xbt.config import run_recipe
from xbt.training import CompatibleBackboneConfig, train_compatible_backbone

if __name__ == "__main__":
    run_recipe(train_compatible_backbone, CompatibleBackboneConfig)
