"""encode_image_batches from JPEGs to vectors, against the model alone and against a plain pipeline.

    python recipes/benchmarks/image_encoding.py --num_workers 2

The plain pipeline does what clip-retrieval's reader and mapper of files do: a DataLoader with four workers
that transform image by image, batches of 256, two of them ahead, the model, unit rows, float16 in numpy.
Weights are random, which takes exactly as long as trained ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bench import Timings, autocast, machine_rates, ratio, side_by_side, write_report
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from xbt.config import config_to_dict, run_recipe
from xbt.encoders import DualEncoder
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.errors import ConfigError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass
class ImageEncodingBenchmark:
    """Time image encoding end to end, side by side with the model alone."""

    images: str = ""
    """A directory of images; without one, JPEGs are drawn."""
    count: int = 512
    """Images to encode."""
    width: int = 640
    """Width of drawn images in pixels."""
    height: int = 480
    """Height of drawn images in pixels."""
    model: str = "ViT-B-32"
    """An architecture of open_clip, such as ViT-B-32, ViT-L-14 or ViT-H-14."""
    batch_size: int = 64
    """Images per forward pass of xbt and of the model alone."""
    num_workers: int = 2
    """Worker processes of xbt that decode."""
    plain_batch_size: int = 256
    """Images per forward pass of the plain pipeline."""
    plain_workers: int = 4
    """Worker processes of the plain pipeline."""
    rounds: int = 5
    """Rounds; everybody is timed once in each."""
    device: str = "cpu"
    """Device of the model."""
    precision: str = "fp32"
    """fp32 or bf16, for everybody."""
    compile: bool = False
    """Compile the towers."""
    threads: int = 2
    """Threads of torch on the CPU."""
    seed: int = 0
    """Seed of the images and the weights."""
    results: str = "recipes/benchmarks/results/image_encoding"
    """Path of the results; model, device and suffix are appended."""


def main(config: ImageEncodingBenchmark) -> None:
    """Measure and write the results."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    encoder = OpenClipEncoder.create(config.model).to(config.device)
    encoder.module.eval().requires_grad_(False)
    encoder.precision = config.precision  # type: ignore[assignment]  # checked when it is used
    if config.compile:
        encoder.compile_towers()
    with TemporaryDirectory() as directory:
        paths = image_paths(config, Path(directory))
        timings, difference = measure(config, encoder, paths)
        size = sum(path.stat().st_size for path in paths) / len(paths)
    probe = side_by_side({"probe": lambda: probed(encoder)}, config.rounds)["probe"]
    rows = [
        {
            "way": name,
            "images per second": round(len(paths) / seconds.median, 2),
            "rate over the model alone": ratio(timings, "model alone", name),
            "rate over the plain pipeline": ratio(timings, "plain pipeline", name),
        }
        for name, seconds in timings.items()
    ]
    slug = f"{config.model}_{config.device}_{config.precision}".lower().replace("-", "_").replace(":", "_")
    written = write_report(
        f"{config.results}_{slug}",
        f"Image encoding, {config.model} on {config.device} in {config.precision}",
        rows,
        f"{describe(config, len(paths), size)} Probing the space of such an encoder takes {probe} seconds.",
        config={**config_to_dict(config), "images": Path(config.images).name},
        seconds=timings,
        difference=difference,
        probe=probe,
        machine=machine_rates(encoder.device, config.precision),
    )
    print(written.with_suffix(".md").read_text(encoding="utf-8"), end="")


def measure(config: ImageEncodingBenchmark, encoder: DualEncoder, paths: list[Path]) -> tuple[Timings, float]:
    """Seconds of every contender, and the largest difference of vectors between xbt and the pipeline."""
    pixels = torch.stack(
        [encoder.preprocess(Image.open(path).convert("RGB")) for path in paths[: config.batch_size]]
    )

    def end_to_end() -> Tensor:
        batches = (paths[i : i + config.batch_size] for i in range(0, len(paths), config.batch_size))
        results = encoder.encode_image_batches(batches, num_workers=config.num_workers)
        return torch.cat([result.vectors for result in results])

    contenders = {
        "model alone": lambda: forward_only(config, encoder, pixels, len(paths)),
        "xbt": end_to_end,
        "plain pipeline": lambda: plain_pipeline(config, encoder, paths),
    }
    difference = np.abs(end_to_end().numpy() - plain_pipeline(config, encoder, paths)).max()  # and warms up
    return side_by_side(contenders, config.rounds, warmup=0), float(difference)


def probed(encoder: DualEncoder) -> object:
    """Compute the encoder's space again; a loaded encoder does so once."""
    encoder.invalidate_space()
    return encoder.space


def forward_only(config: ImageEncodingBenchmark, encoder: DualEncoder, pixels: Tensor, count: int) -> None:
    """Run all images through the model, from pixels that are already on the device."""
    ready = pixels.to(encoder.device)
    with torch.no_grad(), autocast(config.device, config.precision):
        for start in range(0, count, config.batch_size):
            encoder.embed_pixels(ready[: min(config.batch_size, count - start)])


def plain_pipeline(
    config: ImageEncodingBenchmark, encoder: DualEncoder, paths: list[Path]
) -> NDArray[np.float16]:
    """(n, dim) unit rows the plain way; see the head of this file."""
    clip: Any = encoder.module
    loader: DataLoader[Tensor] = DataLoader(
        _Files(paths, encoder.image_transform),
        batch_size=config.plain_batch_size,
        num_workers=config.plain_workers,
        prefetch_factor=2 if config.plain_workers else None,
        pin_memory=encoder.device.type == "cuda",
    )
    parts = []
    with torch.no_grad(), autocast(config.device, config.precision):
        for pixels in loader:
            vectors = normalize(clip.encode_image(pixels.to(encoder.device)), dim=-1)
            parts.append(vectors.cpu().to(torch.float16).numpy())
    return np.concatenate(parts)


class _Files(Dataset[Tensor]):
    def __init__(self, paths: list[Path], transform: Any) -> None:
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        pixels: Tensor = self._transform(Image.open(self._paths[index]))
        return pixels


def image_paths(config: ImageEncodingBenchmark, directory: Path) -> list[Path]:
    """The images of a directory, or JPEGs drawn into another one."""
    if not config.images:
        return list(draw_jpegs(config, directory))
    found = sorted(p for p in Path(config.images).rglob("*") if p.suffix.lower() in SUFFIXES)[: config.count]
    if not found:
        raise ConfigError(f"--images {config.images} holds no image ({', '.join(sorted(SUFFIXES))})")
    return found


def draw_jpegs(config: ImageEncodingBenchmark, directory: Path) -> Iterator[Path]:
    """Smooth shapes and fine grain, which together compress about as far as a photograph."""
    rng = np.random.default_rng(config.seed)
    for number in range(config.count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(
            coarse.resize((config.width, config.height), Image.Resampling.BICUBIC), dtype=float
        )
        grain = rng.normal(0, 6, smooth.shape[:2])[..., None]
        path = directory / f"{number:05}.jpg"
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(path, quality=85)
        yield path


def describe(config: ImageEncodingBenchmark, count: int, size: float) -> str:
    """Describe the table."""
    drawn = "" if config.images else f" drawn with {config.width} x {config.height} pixels,"
    return (
        f"{count} image files,{drawn} {size / 1000:.0f} kB on average; {config.model} with random weights. "
        f"xbt and the model alone: batches of {config.batch_size}, xbt with {config.num_workers} workers. "
        f"Plain pipeline: batches of {config.plain_batch_size}, {config.plain_workers} workers. "
        f"{config.rounds} rounds in turns; ratios are median [least, greatest] of the rounds, above 1 where "
        "the row's way is faster."
    )


if __name__ == "__main__":
    run_recipe(main, ImageEncodingBenchmark)
