"""Embed images or captions into a store: a gallery, or the vectors that a projection is trained on.

    accelerate launch recipes/embed.py --config recipes/configs/embed_flickr30k_images.yaml

Any key of the config can be given as a flag, nested ones with dots (--images.source photos/). Processes share
the shards of the store, or the parts of a stream. A killed job continues with the same command and any number
of processes, and ends with the same store. Items that could not be embedded are listed in rejected.jsonl with
the reason. --retry_rejected true tries them again, also after the job has finished, and --max_rejected 0.01
stops a job that rejects more than this share.

Not supported: processes without a common output directory.
"""

from xbt.config import run_recipe
from xbt.embedding import EmbedConfig, embed

if __name__ == "__main__":
    run_recipe(embed, EmbedConfig)
