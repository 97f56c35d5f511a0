"""The work of `imgtok evaluate`: opens what a configuration names, and feeds the images to the scorers.

The order matters: weights that a score lacks are found out before a model is loaded, and a model's images are drawn
last.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from imgtok import announce
from imgtok.data.images import in_words, open_images
from imgtok.data.trained_on import Chosen, Named
from imgtok.files import check_there, file_sha256
from imgtok.generators.conditioning import ConditionalGenerator
from imgtok.generators.pipeline import pipeline
from imgtok.hub import Found, resolve
from imgtok.losses.lite0 import Lite0Distance
from imgtok.losses.lpips import LPIPS, find_lpips_weights
from imgtok.metrics import probe as probes
from imgtok.metrics import reference as references
from imgtok.metrics.perceptual import DINOSimilarity, Lite0Perceptual, LPIPSDistance
from imgtok.metrics.probe import Probe
from imgtok.metrics.reconstruction import PixelScores
from imgtok.metrics.reference import Reference
from imgtok.metrics.scorers import (
    FAMILIES,
    INCEPTION,
    INCEPTION_SCORE_PARTS,
    LITE0,
    ClassScorer,
    CodeScorer,
    Family,
    FeatureScorer,
    OracleScorer,
    OriginalsReference,
    PairJudge,
    ReconstructionScorer,
    Scorer,
    ShapesDistance,
    features_to_keep,
)
from imgtok.runtime import Blocks
from imgtok.sample.evaluate.config import FEWEST, ON_LITE0, PIXELS, Config
from imgtok.sample.evaluate.real import RealFile, open_real_file, open_references
from imgtok.sample.evaluate.results import Evaluation, Row
from imgtok.sample.evaluate.sources import (
    FileSource,
    GeneratorSource,
    ReconstructionSource,
    Source,
    Versions,
)
from imgtok.sample.reconstruct import open_model, rates_of, size_for
from imgtok.shapes import classifier
from imgtok.shapes.world import CLASS_NAMES, NUM_CLASSES, ShapesConfig
from imgtok.sizes import as_given, in_pixels, sides, size_of, square
from imgtok.tokenizers.base import Autoencoder, Rate
from imgtok.tokenizers.calls import Totals, together
from imgtok.vision import dino, lite0
from imgtok.vision.features import FeatureExtractor, Features
from imgtok.vision.inception import Inception, find_inception_weights
from imgtok.vision.lite0 import Lite0, Lite0Extractor

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

SAMPLES_OF_A_MODEL = 5000
FEW_FOR_IS = 10_000
"""Images of fewer than which an Inception score says it: published ones are of 50,000, ten for each class a part."""


@dataclass(frozen=True)
class Network:
    """Scores on a network's features that are asked for, and what they compare with."""

    family: Family
    metrics: Sequence[str]
    extractor: FeatureExtractor
    reference: Reference | OriginalsReference | None
    """Real images, or the originals where they take their place."""
    originals: OriginalsReference | None
    """What the images reconstruct, where a score compares with that."""


def with_data(config: Config) -> tuple[Config, Named | None]:
    """The configuration with the images to reconstruct and the share of them that is taken, where it leaves these to
    what is known of the tokenizer's training; and these images. Raises as `Named.of` and `check_inputs`.
    """
    if not config.reconstructs:
        return config, None
    assert config.tokenizer is not None
    named = Named.of(config.data, resolve(config.tokenizer))
    return replace(config, data=named.data, held_out=named.share_to_show(config.held_out)), named


def models_of(config: Config, named: Named | None) -> dict[str, Found]:
    """The models whose images are scored, by what a result calls them: "model" with its "tokenizer" (which may be an
    autoencoder), or what reconstructs the images `named`, "tokenizer" or "autoencoder"; none for files.

    Raises FileNotFoundError for what is not there, ValueError for a model of another kind.
    """
    if named is not None:
        return {"autoencoder" if issubclass(named.found.model_class, Autoencoder) else "tokenizer": named.found}
    if config.model is None:
        return {}
    model = resolve(config.model, expect=ConditionalGenerator)
    return {"model": model, "tokenizer": model.part() if config.tokenizer is None else resolve(config.tokenizer)}


def evaluate(
    config: Config, accelerator: Accelerator, models: Mapping[str, Found], named: Named | None = None
) -> Evaluation:
    """Scores what the configuration names, of which `models_of` found the models and `with_data` the images that are
    reconstructed.
    """
    from accelerate.utils import gather_object  # costs seconds to import

    weights: dict[str, str] = {}
    files = _open_files(config, accelerator.device)
    real_file = open_real_file(config)
    lite = _open_lite0(config, weights)
    extractors = _open_extractors(config, lite, accelerator, weights)
    judges = _open_judges(config, lite, accelerator.device, weights)
    source = files or _open_model(config, accelerator.device, weights, models, named)
    _check_source(config, source, judges)
    probe = _open_probe(config, source, extractors, accelerator, weights)
    networks, real = _with_references(config, source, real_file, extractors, accelerator)
    notes = _notes_of_few(config, networks, source.num)
    for note in notes if accelerator.is_main_process else ():
        logger.warning("%s", note)
    scorers = _open_scorers(config, source, judges, networks, extractors, probe, accelerator, weights)
    originals = [network.originals for network in networks if network.originals is not None]
    of_originals: list[Scorer] = []
    if probe is not None and config.compares_pairs:  # what a perfect reconstruction would get
        of_originals.append(_probe_scorer(extractors[LITE0.network], probe, source.num, originals=True))
    fed_once: list[OriginalsReference | Scorer] = [*originals, *of_originals]
    share, drawing = _share(source.num, accelerator), list[Totals]()
    number = torch.zeros((), dtype=torch.long, device=accelerator.device)
    with tqdm(total=len(share), unit="image", desc="evaluate", disable=not accelerator.is_main_process) as progress:
        for versions in source.batches(share, config.batch_size):
            size = _feed(scorers, fed_once, versions)
            drawing += _drawing(versions)
            progress.update(size)
            number += size
    # All sums come first: eigenvalues and neighbours take one process minutes, for which the others must not wait.
    for sums in fed_once:
        sums.reduce(accelerator)
    for family in scorers.values():
        for scorer in family:
            scorer.reduce(accelerator)
    number = accelerator.reduce(number)
    drawing = gather_object(drawing)
    rows = []
    if accelerator.is_main_process:
        _save_originals(config, originals)
        rows = [
            Row(score, rate)
            for rate, family in scorers.items()
            for scorer in (*family, *of_originals)
            for score in scorer.scores()
        ]
    device = f"{_device_name(accelerator.device)}, {accelerator.num_processes} process(es), torch.float32"
    took = together(drawing) if drawing else None
    return Evaluation(rows, source.num, int(number), source.size, source.procedure, device, weights, real, notes, took)


def _drawing(versions: Versions) -> list[Totals]:
    """What drawing a batch took, where its generator counts that: the same for all versions."""
    tokens = next(iter(versions.values())).tokens
    return [] if tokens is None or tokens.calls is None else [tokens.calls.totals()]


def _save_originals(config: Config, originals: Sequence[OriginalsReference]) -> None:
    """Keeps the originals' statistics as the reference to save, where the metrics have no other."""
    if originals and config.save_reference is not None and not config.against_others:
        (only,) = originals  # the configuration allows one network
        references.save(only.reference(), config.save_reference)


def _feed(
    scorers: dict[Rate | None, list[Scorer]], fed_once: Sequence[OriginalsReference | Scorer], versions: Versions
) -> int:
    """Hands a batch's versions to their scorers, and its originals to what looks at them; the number of images."""
    number = 0
    for rate, batch in versions.items():
        if not number:  # all versions have the same originals
            for sums in fed_once:
                sums.update(batch)
        for scorer in scorers[rate]:
            scorer.update(batch)
        number = len(batch.indices)
    return number


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _share(num: int, accelerator: Accelerator) -> range:
    """The indices of this process."""
    return range(accelerator.process_index, num, accelerator.num_processes)


def _check_source(config: Config, source: Source, judges: Sequence[PairJudge]) -> None:
    """Raises ValueError for a score that these images cannot have, before any of them is drawn."""
    metrics = config.chosen_metrics
    if config.resize is not None and source.size != sides(config.resize):
        size = size_of(*source.size)
        raise ValueError(
            f"resize: {as_given(config.resize)} for files, and what is compared with them is {in_pixels(size)} pixels: "
            f"resize={as_given(size)}"
        )
    if "oracle" in metrics:
        square(size_of(*source.size), "metrics: the oracle reads squares: leave it out")
        source.check_classes("the oracle", NUM_CLASSES, CLASS_NAMES)
    if "top1_lite0" in metrics:
        source.check_classes("top1_lite0", lite0.NUM_CLASSES)
    limits: dict[str, int] = {metric: lite0.SMALLEST for metric in metrics if metric in ON_LITE0}
    for judge in judges:
        limits |= judge.smallest
    height, width = source.size
    if small := {metric: smallest for metric, smallest in limits.items() if min(height, width) < smallest}:
        metric, smallest = next(iter(small.items()))
        others = ",".join(other for other in metrics if other not in small)
        remedy = f"; without it: metrics={others}" if others and not config.metrics else ""
        raise ValueError(
            f"metrics: {metric} needs images of at least {smallest} pixels a side, got {width}x{height}{remedy}"
        )
    for metric in metrics:
        if source.num < FEWEST.get(metric, 1):
            raise ValueError(f"metrics: {metric} needs at least {FEWEST[metric]} images, and num is {source.num}")


# Networks that judge


def _open_lite0(config: Config, weights: dict[str, str]) -> Lite0 | None:
    """EfficientNet-Lite0, which judges sets of images by its features, classes and pairs."""
    needed = [metric for metric in config.chosen_metrics if metric in ON_LITE0]
    if not needed:
        return None
    path = lite0.find_weights(
        ", ".join(needed),
        config.lite0_weights,
        trust=config.trust_weights,
        otherwise="; trust_weights=true uses it as it is, and the names of scores carry its hash",
    )
    weights[LITE0.network] = file_sha256(path)
    if not config.metrics:
        logger.info(
            "%s: by %s, since weights of Inception or LPIPS are not here; these are other scores than FID and LPIPS",
            *(", ".join(needed), lite0.NAME),
        )
    return lite0.load(path)


def _open_extractors(
    config: Config, lite: Lite0 | None, accelerator: Accelerator, weights: dict[str, str]
) -> dict[str, FeatureExtractor]:
    """The networks whose features are asked for, by the name that a family has for its network."""
    found: dict[str, FeatureExtractor] = {}
    if needed := INCEPTION.chosen(config.chosen_metrics):
        with accelerator.main_process_first():  # one process downloads
            path = find_inception_weights(", ".join(needed), config.inception_weights, trust=config.trust_weights)
        weights[INCEPTION.network] = file_sha256(path)
        found[INCEPTION.network] = Inception(path, accelerator.device)
    if lite is not None:
        found[LITE0.network] = Lite0Extractor(lite, accelerator.device)
    return found


def _open_judges(config: Config, lite: Lite0 | None, device: torch.device, weights: dict[str, str]) -> list[PairJudge]:
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
    if "perceptual_lite0" in config.chosen_metrics:
        assert lite is not None
        judges.append(Lite0Perceptual(Lite0Distance(lite), device))
    return judges


def _open_probe(
    config: Config,
    source: Source,
    extractors: Mapping[str, FeatureExtractor],
    accelerator: Accelerator,
    weights: dict[str, str],
) -> Probe | None:
    """The judge of top1_probe from the cache, or trained now, at the size of the images that it will judge."""
    if "top1_probe" not in config.chosen_metrics:
        return None
    data, share = config.probe_images
    size = size_of(*source.size)
    training = open_images(data, size, split="train", held_out_fraction=share)
    held_out = open_images(data, size, split="held_out", held_out_fraction=share)
    probes.check_classes(training)
    source.check_classes("top1_probe", training.num_classes, training.class_names)
    with accelerator.main_process_first():  # one process trains, the others find the result
        probe = probes.load_or_train(
            extractors[LITE0.network], training, held_out, quiet=not accelerator.is_main_process
        )
    weights["top1_probe"] = probe.fingerprint
    return probe


def _open_scorers(
    config: Config,
    source: Source,
    judges: Sequence[PairJudge],
    networks: Sequence[Network],
    extractors: Mapping[str, FeatureExtractor],
    probe: Probe | None,
    accelerator: Accelerator,
    weights: dict[str, str],
) -> dict[Rate | None, list[Scorer]]:
    """Fresh scorers for each rate."""
    net = None
    if "fd_shapes" in config.chosen_metrics:
        with accelerator.main_process_first():  # one process trains, the others find the result
            net = classifier.load_or_train()
        weights["fd_shapes"] = classifier.fingerprint(net)
    profile = config.data
    families: dict[Rate | None, list[Scorer]] = {}
    for rate in source.rates:
        family: list[Scorer] = []
        if source.tokenizer is not None:
            family.append(CodeScorer(source.tokenizer, source.num))
        if "oracle" in config.chosen_metrics:
            family.append(OracleScorer(source.num))
        family += [ReconstructionScorer(judge, source.num) for judge in judges]
        family += [
            FeatureScorer(of.family, of.metrics, of.extractor, source.num, of.reference, originals=of.originals)
            for of in networks
        ]
        if "top1_lite0" in config.chosen_metrics:
            family.append(_class_scorer(extractors[LITE0.network], source.num))
        if probe is not None:
            family.append(_probe_scorer(extractors[LITE0.network], probe, source.num))
        if net is not None:
            assert isinstance(profile, ShapesConfig), "see check_inputs"
            family.append(ShapesDistance(net, profile, source.num, accelerator.device))
        families[rate] = family
    return families


def _class_scorer(extractor: FeatureExtractor, num: int) -> ClassScorer:
    """The network's own classifier of ImageNet's classes."""

    def logits(features: Features) -> Tensor:
        assert features.logits is not None
        return features.logits

    protocol = f"{extractor.name}, ImageNet's {lite0.NUM_CLASSES} classes"
    return ClassScorer("lite0", extractor, logits, lite0.NUM_CLASSES, num, protocol, ranks=(1, 5))


def _probe_scorer(extractor: FeatureExtractor, probe: Probe, num: int, *, originals: bool = False) -> ClassScorer:
    """A classifier of the data's own classes, which was made for them."""

    def logits(features: Features) -> Tensor:
        return probe.logits(features.pool)

    return ClassScorer("probe", extractor, logits, probe.num_classes, num, probe.label, originals=originals)


# Images


def _begins(config: Config, device: torch.device, **what: object) -> None:
    """The line that the job begins with."""
    real = None
    if config.against_others:
        real = config.reference or (None if config.data is None else in_words(config.data))
    metrics = ", ".join(config.chosen_metrics)
    announce.begins("evaluate", **what, metrics=metrics, compared_with=real, on=device, out=config.result())


def _open_files(config: Config, device: torch.device) -> FileSource | None:
    """What is scored, where it is files. Raises FileNotFoundError for whatever is named and not there."""
    given: dict[str, Any] = {"images": config.images, "originals": config.originals, "reference": config.reference}
    given |= {f"{name}.path": getattr(getattr(config, name), "path", None) for name in ("data", "probe_data")}
    for field, path in given.items():
        if path is not None:
            check_there(path, field)
    if config.images is None:
        return None
    _begins(config, device, images=config.images, originals=config.originals)
    return FileSource(
        config.images,
        config.num,
        config.labels,
        config.originals,
        resize=config.resize,
        values=config.array_values,
    )


def _open_model(
    config: Config,
    device: torch.device,
    weights: dict[str, str],
    models: Mapping[str, Found],
    named: Named | None,
) -> Source:
    if named is None:
        pipe = pipeline(
            models["model"],
            tokenizer=models["tokenizer"],
            device=device,
            dtype=config.precision,
            exact=config.exact,
            threads=config.threads,
        )
        model, decoder = (found.in_words for found in models.values())
        _begins(config, device, model=model, decoder=decoder, num=config.num or SAMPLES_OF_A_MODEL)
        weights |= {name: found.weights_sha256() for name, found in models.items()}
        return GeneratorSource(
            pipe,
            config.num or SAMPLES_OF_A_MODEL,
            pipe.class_numbers(config.classes) if config.classes else (),
            config.chosen_rates,
            seed=config.seed,
            sampling=config.sampling.over(pipe.sampling, "sampling"),
            decoding=config.decoding.over(pipe.decoding, "decoding"),
        )
    found = named.found
    tokenizer = open_model(found).to(device)
    chosen = named.to_show(size_for(tokenizer, config.image_size, found), config.held_out)
    _begins(config, device, data=chosen.words, model=found.in_words)
    weights |= {name: model.weights_sha256() for name, model in models.items()}
    return ReconstructionSource(
        tokenizer,
        chosen.source,
        config.num,
        rates_of(tokenizer, config.rates),
        seed=config.seed,
        decoding=config.decoding.over(tokenizer.config.decoding, "decoding"),
        blocks=Blocks(device, config.exact, config.threads),
        what=_data_in_words(chosen),
        rendered=isinstance(config.data, ShapesConfig),
    )


def _data_in_words(chosen: Chosen) -> str:
    kind = chosen.data.kind
    if chosen.held_out is None:
        return f"the held-out part of data ({kind})"
    if chosen.held_out == 1:
        return f"all images of data ({kind})"
    return f"the held-out images of data ({kind}, share {chosen.held_out:g})"


def _with_references(
    config: Config,
    source: Source,
    file: RealFile | None,
    extractors: Mapping[str, FeatureExtractor],
    accelerator: Accelerator,
) -> tuple[list[Network], str | None]:
    """The families of scores that are asked for, with the real images that each compares with; and which these are."""
    chosen = [(family, metrics) for family in FAMILIES if (metrics := family.chosen(config.chosen_metrics))]
    looking = [(family, metrics) for family, metrics in chosen if set(metrics) & set(config.with_reference)]
    real: dict[str, Reference] = {}
    words: str | None = None
    if config.against_others:
        real, words = open_references(config, file, source.size, looking, extractors, accelerator)
    networks = []
    for family, metrics in chosen:
        extractor, originals = extractors[family.network], None
        reference: Reference | OriginalsReference | None = real.get(family.network)
        beside = config.own_originals and (family, metrics) in looking
        if beside or "rfid" in metrics:
            keep = features_to_keep(family, metrics, source.num, real=True) if beside else 0
            originals = OriginalsReference(extractor, source.num, keep)
        networks.append(Network(family, metrics, extractor, originals if beside else reference, originals))
    return networks, words


def _notes_of_few(config: Config, networks: Sequence[Network], num: int) -> list[str]:
    """What scores of few images are worth."""
    notes = []
    for network in networks:
        distances = [metric for metric in (network.family.frechet, "rfid") if metric in network.metrics]
        counts = {"images": num}
        if isinstance(network.reference, Reference) and network.reference.pool.count:  # 0 is unknown
            counts["real images"] = network.reference.pool.count
        what, count = min(counts.items(), key=lambda item: item[1])
        if distances and count <= network.extractor.width:
            notes.append(_of_few(", ".join(distances), f"{count} {what}", network.extractor.width))
    if "fd_shapes" in config.chosen_metrics and num <= classifier.NUM_FEATURES:
        notes.append(_of_few("fd_shapes", f"{num} images", classifier.NUM_FEATURES))
    if "is" in config.chosen_metrics and num < FEW_FOR_IS:
        part = num // INCEPTION_SCORE_PARTS
        notes.append(
            f"is of {num} images: each of its {INCEPTION_SCORE_PARTS} parts has {part}, which no score of a part can "
            "exceed, and it grows with them; compare it only with that of as many images"
        )
    return notes


def _of_few(distances: str, images: str, width: int) -> str:
    return (
        f"{distances} of {images} in {width} dimensions: the covariance is rank-deficient, and the number depends on "
        "how many images there are; compare it only with that of as many images against the same reference"
    )
