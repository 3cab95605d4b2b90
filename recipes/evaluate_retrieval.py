r"""Measure old/old, new/old and new/new retrieval: T2I and I2T, R@1/5/10, and whether the criterion is met.

    accelerate launch recipes/evaluate_retrieval.py --config recipes/configs/evaluate_b32_l14.yaml

R@k is the hit rate of the CLIP papers, with exact ranks; ties are ranked pessimistically. The table goes to
standard output, JSON and Markdown to the output directory.

To reproduce published numbers, give one config for the models and one for the data with its protocol:

    accelerate launch recipes/evaluate_retrieval.py --config recipes/configs/evaluate_pair_b32_h14.yaml \
        --config recipes/configs/evaluate_on_coco_5k.yaml --output_dir runs/b32_h14/coco_5k

Not supported: several processes.
"""

from xbt.config import run_recipe
from xbt.evaluation import format_table
from xbt.evaluation.job import EvaluationConfig, run_evaluation


def main(config: EvaluationConfig) -> None:
    """Evaluate and print the table."""
    run_evaluation(config, show=lambda report: print(format_table(report)))


if __name__ == "__main__":
    run_recipe(main, EvaluationConfig)
