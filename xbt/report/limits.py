"""Limits of a report: facts that the sample cannot show, stated on the page."""

from __future__ import annotations

from xbt.projections.auto.choose import MIN_IMAGES
from xbt.report.curve import MIN_ITEMS
from xbt.report.measure import OLD, Measured
from xbt.report.sample import Sample


def find_limits(sample: Sample, measured: Measured, gallery_size: int) -> list[str]:
    """List the limits of a report as sentences, the most important first."""
    limits = [*_limits_of_size(sample, measured, gallery_size), *sample.notes]
    if sample.corpus is None:
        limits.append(
            "No text corpus was given: projections were fitted only to the texts of the sample, and more "
            "captions may improve them."
        )
    if measured.pairs.new_images is None:
        limits.append(
            "The images have no vectors of the new model: image queries and the result of re-embedding the "
            "gallery are unknown."
        )
    elif min(measured.n_chosen, len(measured.pairs)) < MIN_ITEMS:
        limits.append(f"Fewer than {MIN_ITEMS} images on a side: no backfill curve was drawn.")
    if sample.skipped:
        listed = ", ".join(name for name, _ in sample.skipped[:5])
        more = f" and {len(sample.skipped) - 5} more" if len(sample.skipped) > 5 else ""
        limits.append(f"{len(sample.skipped)} images could not be read and were left out: {listed}{more}.")
    if sample.old.encoder is None:
        limits.append("No encoder was given: the time to embed an image or a query was not measured.")
    return [*limits, *_ALWAYS]


_ALWAYS = (
    "An image counts as wrong unless the text was written for it, even if the text describes it too.",
    "If either model was trained on these images or texts, its results are too optimistic.",
    "The texts of the sample represent the queries of your users. If users ask differently, measure with "
    "their queries.",
)


def _limits_of_size(sample: Sample, measured: Measured, gallery_size: int) -> list[str]:
    n_images = len(measured.pairs)
    limits = []
    if min(measured.n_chosen, n_images) < MIN_IMAGES:
        limits.append(
            f"The sample is too small for intervals: {measured.n_chosen} images to choose by and {n_images} "
            f"to measure with, and fewer than {MIN_IMAGES} show nothing. Use a larger sample."
        )
        if measured.n_chosen < MIN_IMAGES:
            limits.append(
                "The method was not chosen by comparison: it is a map fitted to texts, mixed in equal parts "
                "with the old query where the old model may run."
            )
    half_width = max(
        (interval[2] - interval[1]) / 2
        for interval in (
            measured.interval(OLD, direction, k) for direction in measured.directions for k in measured.ks
        )
    )
    limits.append(
        f"Measured on {n_images:,} images and {len(measured.pairs.image_of_text):,} texts, drawn from "
        f"{sample.available:,} images; R@k is known to within ±{100 * half_width:.1f} points at worst."
    )
    if gallery_size > n_images:
        limits.append(
            f"R@k was measured among {n_images:,} images. Among the {gallery_size:,} images of the gallery "
            "R@k is lower for every model, and the differences change."
        )
    return limits
