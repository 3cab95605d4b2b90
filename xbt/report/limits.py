"""What a report could not find out, so that nobody takes it for known."""

from __future__ import annotations

from xbt.projections.auto.choose import MIN_IMAGES
from xbt.report.curve import MIN_ITEMS
from xbt.report.measure import OLD, Measured
from xbt.report.sample import Sample


def find_limits(sample: Sample, measured: Measured, gallery_size: int) -> list[str]:
    """Sentences, what matters most first.

    Args:
        sample: The whole sample.
        measured: What was measured.
        gallery_size: Items of the gallery.
    """
    found = [*_of_size(sample, measured, gallery_size), *sample.notes]
    if sample.corpus is None:
        found.append(
            "No text corpus was given: projections were fitted to the texts of the sample alone, and more "
            "captions may serve them better."
        )
    if measured.pairs.new_images is None:
        found.append(
            "The images have no vectors of the new model: image queries, and what re-embedding the gallery "
            "would give, are unknown."
        )
    elif min(measured.n_chosen, len(measured.pairs)) < MIN_ITEMS:
        found.append(f"Fewer than {MIN_ITEMS} images on a side: no backfill curve was drawn.")
    if sample.skipped:
        listed = ", ".join(name for name, _ in sample.skipped[:5])
        more = f" and {len(sample.skipped) - 5} more" if len(sample.skipped) > 5 else ""
        found.append(f"{len(sample.skipped)} images could not be read and were left out: {listed}{more}.")
    if sample.old.encoder is None:
        found.append("No encoder was given: what embedding an image or a query takes was not measured.")
    return [*found, *_ALWAYS]


_ALWAYS = (
    "An image counts as wrong unless the text was written for it, even where it fits as well.",
    "If either model was trained on these very images or texts, its figures flatter it.",
    "The texts of the sample stand for what your users type. If they ask otherwise, measure with their "
    "queries.",
)


def _of_size(sample: Sample, measured: Measured, gallery_size: int) -> list[str]:
    n_images = len(measured.pairs)
    found = []
    if min(measured.n_chosen, n_images) < MIN_IMAGES:
        found.append(
            f"The sample is too small for intervals: {measured.n_chosen} images to choose by and {n_images} "
            f"to measure with, and fewer than {MIN_IMAGES} show nothing. Bring more."
        )
        if measured.n_chosen < MIN_IMAGES:
            found.append(
                "The method was not chosen by comparison: it is a map fitted to texts, mixed in equal parts "
                "with the old query where the old model may run."
            )
    reach = max(
        (interval[2] - interval[1]) / 2
        for interval in (
            measured.interval(OLD, direction, k) for direction in measured.directions for k in measured.ks
        )
    )
    found.append(
        f"Measured on {n_images:,} images and {len(measured.pairs.image_of_text):,} texts, drawn from "
        f"{sample.available:,} images; R@k is known to within ±{100 * reach:.1f} points at worst."
    )
    if gallery_size > n_images:
        found.append(
            f"R@k was measured among {n_images:,} images. Among the {gallery_size:,} of the gallery every "
            "model finds less, and the differences will be others."
        )
    return found
