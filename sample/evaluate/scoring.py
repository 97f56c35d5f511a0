"""The work of `imgtok evaluate`: opens what a configuration names, and feeds the images to the scorers.

The order matters: weights that a score lacks are found out before a model is loaded, and a model's images are drawn
last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from imgtok.data.images import ImageSource, open_images
from imgtok.files import file_sha256
from imgtok.generators.pipeline import pipeline
from imgtok.hub import resolve
from imgtok.losses.lpips import LPIPS, find_lpips_weights
from imgtok.metrics import reference as references
from imgtok.metrics.perceptual import DINOSimilarity, LPIPSDistance
from imgtok.metrics.precision_recall import MOST_REAL_FEATURES, NEIGHBOURS
from imgtok.metrics.reconstruction import PixelScores
from imgtok.metrics.reference import FeatureSums, Reference
from imgtok.metrics.saved_images import SavedImages
from imgtok.metrics.scorers import (
    INCEPTION_SCORE_PARTS,
    NO_LABELS,
    CodeScorer,
    InceptionScorer,
    OracleScorer,
    OriginalsReference,
    PairJudge,
    ReconstructionScorer,
    Scorer,
    ShapesDistance,
)
from imgtok.runtime import Blocks
from imgtok.sample.evaluate.config import INCEPTION, PIXELS, WITH_REFERENCE, Config, Metric
from imgtok.sample.evaluate.results import Evaluation, Row
from imgtok.sample.evaluate.sources import (
    FileSource,
    GeneratorSource,
    ReconstructionSource,
    Source,
    Versions,
    image_batches,
)
from imgtok.sample.reconstruct import open_model, rates_of, size_for
from imgtok.shapes import classifier
from imgtok.shapes.world import NUM_CLASSES, ShapesConfig
from imgtok.tokenizers.base import Autoencoder, Rate
from imgtok.vision import dino
from imgtok.vision.inception import FeatureExtractor, Inception, find_inception_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

SAMPLES_OF_A_MODEL = 5000
FEWEST: Mapping[Metric, int] = {
    "rfid": 2,
    "fid": 2,
    "sfid": 2,
    "fd_shapes": 2,
    "is": INCEPTION_SCORE_PARTS,
    "precision_recall": NEIGHBOURS + 1,
}
"""Images without which a score does not exist."""


def evaluate(config: Config, accelerator: Accelerator) -> Evaluation:
    """Scores what the configuration names."""
    weights: dict[str, str] = {}
    extractor = _open_extractor(config, accelerator, weights)
    judges = _open_judges(config, accelerator.device, weights)
    source = _open_source(config, accelerator.device, weights)
    _check_source(config.chosen_metrics, source, judges)
    real = _open_reference(config, source, extractor, accelerator)
    originals = None
    if extractor is not None and "rfid" in config.chosen_metrics:
        originals = OriginalsReference(extractor, source.num)
    scorers = _open_scorers(config, source, judges, extractor, real, originals, accelerator, weights)
    share = _share(source.num, accelerator)
    number = torch.zeros((), dtype=torch.long, device=accelerator.device)
    with tqdm(total=len(share), unit="image", desc="evaluate", disable=not accelerator.is_main_process) as progress:
        for versions in source.batches(share, config.batch_size):
            size = _feed(scorers, originals, versions)
            progress.update(size)
            number += size
    # All sums come first: eigenvalues and neighbours take one process minutes, for which the others must not wait.
    if originals is not None:
        originals.reduce(accelerator)
    for family in scorers.values():
        for scorer in family:
            scorer.reduce(accelerator)
    number = accelerator.reduce(number)
    rows = []
    if accelerator.is_main_process:
        _save_originals(config, originals)
        rows = [Row(s, rate) for rate, family in scorers.items() for scorer in family for s in scorer.scores()]
    device = f"{_device_name(accelerator.device)}, {accelerator.num_processes} process(es), torch.float32"
    return Evaluation(rows, source.num, int(number), source.size, source.procedure, device, weights)


def _save_originals(config: Config, originals: OriginalsReference | None) -> None:
    """Keeps the originals' statistics as the reference to save, where the metrics have no other."""
    others = set(WITH_REFERENCE) & set(config.chosen_metrics)
    if originals is not None and config.save_reference is not None and not others:
        references.save(originals.reference(), config.save_reference)


def _feed(scorers: dict[Rate | None, list[Scorer]], originals: OriginalsReference | None, versions: Versions) -> int:
    """Hands a batch's versions to their scorers, and its originals to their reference; the number of images."""
    number = 0
    for rate, batch in versions.items():
        if originals is not None and not number:  # all versions have the same originals
            originals.update(batch)
        for scorer in scorers[rate]:
            scorer.update(batch)
        number = len(batch.indices)
    return number


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _share(num: int, accelerator: Accelerator) -> range:
    """The indices of this process."""
    return range(accelerator.process_index, num, accelerator.num_processes)


def _check_source(metrics: Sequence[Metric], source: Source, judges: Sequence[PairJudge]) -> None:
    """Raises ValueError for a score that these images cannot have, before any of them is drawn."""
    if "oracle" in metrics and not source.labelled:
        raise ValueError(NO_LABELS)
    height, width = source.size
    for metric, smallest in (pair for judge in judges for pair in judge.smallest.items()):
        if min(source.size) < smallest:
            raise ValueError(
                f"metrics: {metric} needs images of at least {smallest} pixels a side, got {width}x{height}"
            )
    for metric in metrics:
        if source.num < FEWEST.get(metric, 1):
            raise ValueError(f"metrics: {metric} needs at least {FEWEST[metric]} images, and num is {source.num}")


# Networks that judge


def _open_extractor(config: Config, accelerator: Accelerator, weights: dict[str, str]) -> FeatureExtractor | None:
    needed = [metric for metric in INCEPTION if metric in config.chosen_metrics]
    if not needed:
        return None
    with accelerator.main_process_first():  # one process downloads
        path = find_inception_weights(", ".join(needed), config.inception_weights, trust=config.trust_weights)
    weights["inception"] = file_sha256(path)
    return Inception(path, accelerator.device)


def _open_judges(config: Config, device: torch.device, weights: dict[str, str]) -> list[PairJudge]:
    """Whatever compares reconstructions with their originals; networks from files, never downloaded."""
    judges: list[PairJudge] = []
    if set(PIXELS) & set(config.chosen_metrics):
        judges.append(PixelScores(config.chosen_metrics, device))
    if "lpips" in config.chosen_metrics:
        files = find_lpips_weights("lpips", config.lpips_net, config.lpips_backbone, config.lpips_heads)
        weights["lpips_backbone"], weights["lpips_heads"] = map(file_sha256, files)
        name = f"{config.lpips_net}:{weights['lpips_backbone'][:8]}:{weights['lpips_heads'][:8]}"
        judges.append(LPIPSDistance(LPIPS.from_files(config.lpips_net, *files), name, device))
    if "dino" in config.chosen_metrics:
        path = dino.find_weights(config.dino_model, config.dino_weights)
        weights["dino"] = file_sha256(path)
        net = dino.load(config.dino_model, path, config.dino_size)
        judges.append(DINOSimilarity(net, f"{config.dino_model}:{weights['dino'][:8]}", device))
    return judges


def _open_scorers(
    config: Config,
    source: Source,
    judges: Sequence[PairJudge],
    extractor: FeatureExtractor | None,
    real: Reference | None,
    originals: OriginalsReference | None,
    accelerator: Accelerator,
    weights: dict[str, str],
) -> dict[Rate | None, list[Scorer]]:
    """Fresh scorers for each rate."""
    net = None
    if "fd_shapes" in config.chosen_metrics:
        with accelerator.main_process_first():  # one process trains, the others find the result
            net = classifier.load_or_train()
        weights["fd_shapes"] = classifier.fingerprint(net)
    profile = config.data if isinstance(config.data, ShapesConfig) else ShapesConfig()
    families: dict[Rate | None, list[Scorer]] = {}
    for rate in source.rates:
        family: list[Scorer] = []
        if source.tokenizer is not None:
            family.append(CodeScorer(source.tokenizer, source.num))
        if "oracle" in config.chosen_metrics:
            family.append(OracleScorer(source.num))
        family += [ReconstructionScorer(judge, source.num) for judge in judges]
        if extractor is not None:
            family.append(InceptionScorer(config.chosen_metrics, extractor, source.num, real, originals=originals))
        if net is not None:
            family.append(ShapesDistance(net, profile, source.num, accelerator.device))
        families[rate] = family
    return families


# Images


def _open_source(config: Config, device: torch.device, weights: dict[str, str]) -> Source:
    if config.images is not None:
        return FileSource(config.images, config.num, config.labels, NUM_CLASSES, config.originals)
    if config.model is not None:
        pipe = pipeline(
            config.model,
            tokenizer=config.tokenizer,
            device=device,
            dtype=config.precision,
            exact=config.exact,
            threads=config.threads,
        )
        assert pipe.found is not None, "it was loaded by its name"
        weights["model"], weights["tokenizer"] = (found.weights_sha256() for found in pipe.found)
        return GeneratorSource(
            pipe,
            config.num or SAMPLES_OF_A_MODEL,
            config.classes,
            config.chosen_rates,
            seed=config.seed,
            sampling=config.sampling.over(pipe.sampling, "sampling"),
            decoding=config.decoding.over(pipe.decoding, "decoding"),
        )
    assert config.tokenizer is not None
    found = resolve(config.tokenizer)
    model = open_model(found).to(device)
    weights["autoencoder" if isinstance(model, Autoencoder) else "tokenizer"] = found.weights_sha256()
    return ReconstructionSource(
        model,
        _open_data(config, size_for(model, config.image_size)),
        config.num,
        rates_of(model, config.rates),
        seed=config.seed,
        decoding=config.decoding.over(model.config.decoding, "decoding"),
        blocks=Blocks(device, config.exact, config.threads),
        what=_data_in_words(config),
        rendered=isinstance(config.data, ShapesConfig),
    )


def _data_in_words(config: Config) -> str:
    assert config.data is not None
    if config.held_out == 1:
        return f"all images of data ({config.data.kind})"
    return f"the held-out images of data ({config.data.kind}, share {config.held_out:g})"


def _open_data(config: Config, size: int) -> ImageSource:
    """Images to reconstruct: the held-out part. Real images to compare with: all, as in the published protocol."""
    assert config.data is not None
    if config.reconstructs and config.held_out < 1:
        return open_images(config.data, size, split="held_out", held_out_fraction=config.held_out)
    return open_images(config.data, size, split="train", held_out_fraction=0.0)


def _open_reference(
    config: Config, source: Source, extractor: FeatureExtractor | None, accelerator: Accelerator
) -> Reference | None:
    """Statistics of real images: read from a file, or taken from images now."""
    if extractor is None or not set(WITH_REFERENCE) & set(config.chosen_metrics):
        return None
    if config.reference is not None and references.holds_statistics(config.reference):
        return references.load(config.reference, extractor.name, config.assume_extractor)
    if config.reference is not None:
        saved = SavedImages(config.reference)
        if saved.size != source.size:
            raise ValueError(
                f"{config.reference}: images of {saved.size[1]}x{saved.size[0]}, but those to score are "
                f"{source.size[1]}x{source.size[0]}; data.kind=folder data.path=... crops them to that size"
            )
        return _measure(saved, range(len(saved)), config.reference.stem, config, extractor, accelerator)
    assert config.data is not None
    images = _open_data(config, min(source.size))
    return _measure(images, range(len(images)), f"{config.data.kind}-train", config, extractor, accelerator)


def _measure(
    images: ImageSource | SavedImages,
    indices: Sequence[int],
    name: str,
    config: Config,
    extractor: FeatureExtractor,
    accelerator: Accelerator,
) -> Reference:
    """Statistics of the given images over all processes."""
    metrics = config.chosen_metrics
    keep = MOST_REAL_FEATURES if "precision_recall" in metrics else 0
    sums = FeatureSums(len(indices), spatial="sfid" in metrics, keep=keep)
    for chunk, pixels in image_batches(images, _share(len(indices), accelerator), config.batch_size):
        sums.update(chunk, extractor(pixels))
    sums.reduce(accelerator)
    reference = sums.reference(name, extractor.name)
    if config.save_reference is not None and accelerator.is_main_process:
        references.save(reference, config.save_reference)
    return reference
