"""Embed images or captions into a store: a gallery, or the vectors that a projection is trained on.

    accelerate launch recipes/embed.py --config recipes/configs/embed_flickr30k_images.yaml

Any key of the config can be given as a flag, nested ones with dots (--images.source photos/). Processes share
the shards of the store, or the parts of a stream. A job that was killed continues when the same command is
given again, with any number of processes, and ends with the same store. What could not be embedded is listed
in rejected.jsonl, with the reason; --retry_rejected true tries that again, also of a finished job, and
--max_rejected 0.01 stops a job of which too much is rejected.

Not supported: processes that do not see the same output directory.
"""

from xbt.config import run_recipe
from xbt.embedding import EmbedConfig, embed

if __name__ == "__main__":
    run_recipe(embed, EmbedConfig)
