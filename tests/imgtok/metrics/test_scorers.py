"""The families of scores, their names, and that none depends on batches or processes."""

from __future__ import annotations

import math

import pytest
import torch
from toy import ToyTok, ToyTokConfig

from imgtok.metrics.kernel import kernel_distance
from imgtok.metrics.reconstruction import PixelScores
from imgtok.metrics.reference import FeatureSums
from imgtok.metrics.scorers import (
    INCEPTION,
    LITE0,
    ClassScorer,
    CodeScorer,
    FeatureScorer,
    OracleScorer,
    OriginalsReference,
    ReconstructionScorer,
    ScoredBatch,
    ShapesDistance,
    short,
)
from imgtok.pictures import to_uint8
from imgtok.randomness import spread
from imgtok.shapes.classifier import ShapesNet
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig
from imgtok.tokenizers.karl import KARL, KARLConfig, TransformerConfig
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vae import VAEConfig
from imgtok.vision.features import Features

ALL = ("fid", "sfid", "is", "precision_recall")


def feed(scorer, images, rank=0, processes=1, batch=7, labels=None, originals=None):
    for start in range(rank, len(images), processes * batch):
        indices = list(range(start, min(len(images), start + processes * batch), processes))
        rows = [None if x is None else x[indices] for x in (labels, originals)]
        scorer.update(ScoredBatch(indices, images[indices], *rows))
    return scorer


def values(scorer) -> dict[str, float]:
    return {score.key: score.value for score in scorer.scores()}


@pytest.mark.parametrize(("count", "name"), [(256, "256"), (5000, "5k"), (50000, "50k"), (1500, "1500"), (1000, "1k")])
def test_numbers_in_names(count, name):
    assert short(count) == name


def reference(extractor, images, name="real"):
    sums = FeatureSums(len(images), spatial=True, keep=len(images))
    sums.update(range(len(images)), extractor(images))
    sums.reduce(None)
    return sums.reference(name, extractor.name)


def test_inception_scores_and_their_names(extractor, random_images):
    real, fake = random_images(60), random_images(40, seed=1)
    scorer = feed(FeatureScorer(INCEPTION, ALL, extractor, 40, reference(extractor, real)), fake)
    scorer.reduce(None)
    assert [score.name for score in scorer.scores()] == [
        "FID-40[inception-v3-compat, real]",
        "sFID-40[inception-v3-compat, real]",
        "precision-40[inception-v3-compat, real 60, k=3]",
        "recall-40[inception-v3-compat, real 60, k=3]",
        "IS-10-40[inception-v3-compat]",
    ]
    found = values(scorer)
    expected = reference(extractor, fake)
    assert found["fid"] == pytest.approx(expected.pool.distance(reference(extractor, real).pool))
    assert found["sfid"] == pytest.approx(expected.spatial.distance(reference(extractor, real).spatial))
    assert found["fid"] != pytest.approx(found["sfid"])
    assert found["is"] > 1


def test_equal_sets_are_at_zero(extractor, random_images):
    images = random_images(40)
    scorer = feed(
        FeatureScorer(INCEPTION, ("fid", "precision_recall"), extractor, 40, reference(extractor, images)), images
    )
    scorer.reduce(None)
    assert values(scorer) == pytest.approx({"fid": 0, "precision": 1, "recall": 1}, abs=1e-6)


def test_inception_scores_of_two_processes(extractor, random_images, reduce_together):
    real, fake = reference(extractor, random_images(60)), random_images(41, seed=1)
    alone = feed(FeatureScorer(INCEPTION, ALL, extractor, 41, real), fake)
    alone.reduce(None)
    pair = [feed(FeatureScorer(INCEPTION, ALL, extractor, 41, real), fake, rank, 2, batch=5) for rank in range(2)]
    reduce_together(*pair)
    for scorer in pair:
        # The extractor's float32 rounds by batch size; the sums themselves are tested to 1e-10 in test_accumulate.py.
        assert values(scorer) == pytest.approx(values(alone), rel=1e-6)


def test_what_a_reference_lacks_is_said_at_once(extractor, random_images):
    with pytest.raises(ValueError, match="fid, sfid compare with real images"):
        FeatureScorer(INCEPTION, ("fid", "sfid", "is"), extractor, 10, None)
    sums = FeatureSums(20, spatial=False, keep=0)
    sums.update(range(20), extractor(random_images(20)))
    bare = sums.reference("bare", extractor.name)
    with pytest.raises(ValueError, match="bare has no spatial statistics"):
        FeatureScorer(INCEPTION, ("sfid",), extractor, 10, bare)
    with pytest.raises(ValueError, match="needs the real images themselves"):
        FeatureScorer(INCEPTION, ("precision_recall",), extractor, 10, bare)


class Bare:
    """An extractor that has pool features alone."""

    name, width = "bare", 12

    def __init__(self, extractor):
        self._extractor = extractor

    def __call__(self, images):
        return Features(self._extractor(images).pool)


def test_another_network_gives_its_own_scores_alone_against_its_own_originals(
    extractor, random_images, reduce_together
):
    """Whatever is asked of Inception is not its business."""
    originals, images = random_images(41), random_images(41, seed=1)
    metrics = ("fid", "is", "sfid", "rfid", "kid", "fd_lite0", "kd_lite0", "precision_recall_lite0")

    def scored(rank=0, processes=1, batch=7):
        side = OriginalsReference(Bare(extractor), 41, keep=30)
        scorer = FeatureScorer(LITE0, metrics, Bare(extractor), 41, side, originals=side)
        for part in (side, scorer):
            feed(part, images, rank, processes, batch, originals=originals)
        return side, scorer

    side, scorer = scored()
    side.reduce(None)
    scorer.reduce(None)
    assert [score.name for score in scorer.scores()] == [
        "FD-lite0-41[bare, own originals]",
        "KD-lite0-41[bare, own originals 30, cubic]",
        "precision-lite0-41[bare, own originals 30, k=3]",
        "recall-lite0-41[bare, own originals 30, k=3]",
    ]
    ours, real = extractor(images).pool, extractor(originals).pool[spread(30, 41)]
    assert values(scorer)["kd_lite0"] == pytest.approx(kernel_distance(ours, real), rel=1e-6)
    pairs = [scored(rank, 2, batch=5) for rank in range(2)]
    reduce_together(*(side for side, _ in pairs))
    reduce_together(*(scorer for _, scorer in pairs))
    for _, half in pairs:
        assert values(half) == pytest.approx(values(scorer), rel=1e-5)


def test_kid_looks_at_no_more_images_than_it_has_time_for(extractor, random_images, monkeypatch):
    monkeypatch.setattr("imgtok.metrics.scorers.MOST_IMAGES", 20)
    real, images = random_images(60), random_images(40, seed=1)
    scorer = feed(FeatureScorer(INCEPTION, ("kid",), extractor, 40, reference(extractor, real)), images)
    scorer.reduce(None)
    (score,) = scorer.scores()
    assert score.name == "KID-20[inception-v3-compat, real 20, cubic]"
    sides = (extractor(side).pool[spread(20, len(side))] for side in (images, real))
    assert score.value == pytest.approx(kernel_distance(*sides), rel=1e-6)


# Classes


def test_a_reading_of_the_features_is_compared_with_the_labels(extractor, random_images, reduce_together):
    images = random_images(11)
    answers = extractor(images).logits.argsort(dim=1, descending=True)
    labels = answers[torch.arange(11), torch.tensor([0] * 4 + [1] * 5 + [2] * 2)]

    def scored(rank=0, processes=1):
        scorer = ClassScorer("net", extractor, lambda features: features.logits, 10, 11, "how", ranks=(1, 2))
        return feed(scorer, images, rank, processes, labels=labels)

    scorer = scored()
    scorer.reduce(None)
    assert {score.name: score.value for score in scorer.scores()} == {
        "top1-net-11[how]": pytest.approx(4 / 11),
        "top2-net-11[how]": pytest.approx(9 / 11),
    }
    pair = [scored(rank, 2) for rank in range(2)]
    reduce_together(*pair)
    assert values(pair[0]) == values(pair[1]) == values(scorer)
    with pytest.raises(ValueError, match="top1_net compares with labels, .* index modulo 10"):
        feed(ClassScorer("net", extractor, lambda features: features.logits, 10, 11, "how"), images)


def test_images_that_go_through_the_classes_in_turn_have_as_many_as_a_score_knows():
    batch = ScoredBatch([5, 64, 130], torch.zeros(3, 3, 4, 4), balanced=True)
    assert batch.classes("a", 64).tolist() == [5, 0, 2]
    assert batch.classes("a", 1000).tolist() == [5, 64, 130]


# Shapes

PROFILE = ShapesConfig(textures=("solid",), sizes=("large",), scale=1.2)


def shapes(num: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = ShapesDataset(PROFILE, size).batch(range(num))
    return to_uint8(images), labels


@pytest.fixture(scope="module")
def net() -> ShapesNet:
    torch.manual_seed(0)
    return ShapesNet().eval()


def test_fd_shapes_of_real_renders_is_like_the_clean_row(net, reduce_together):
    images, _ = shapes(128)
    cpu = torch.device("cpu")
    scorer = feed(ShapesDistance(net, PROFILE, 128, cpu), images)
    scorer.reduce(None)
    found = values(scorer)
    assert [score.name for score in scorer.scores()] == [
        "fd_shapes-128[shapesnet-1@32]",
        "fd_shapes-128[shapesnet-1@32] of other real renders",
    ]
    assert 0 < found["fd_shapes"] < 3 * found["fd_shapes_clean"]
    damaged = feed(ShapesDistance(net, PROFILE, 128, cpu), torch.full_like(images, 128))
    damaged.reduce(None)
    assert values(damaged)["fd_shapes"] > 10 * found["fd_shapes"]
    assert values(damaged)["fd_shapes_clean"] == pytest.approx(found["fd_shapes_clean"])
    pair = [feed(ShapesDistance(net, PROFILE, 128, cpu), images, rank, 2, batch=9) for rank in range(2)]
    reduce_together(*pair)
    # Convolutions of other batch sizes round differently in float32; the sums add nothing to that.
    assert values(pair[0]) == pytest.approx(found, rel=1e-3)


def test_fd_shapes_never_meets_the_scenes_of_a_data_set(net):
    """Reconstructions of held-out scenes must not be compared with these very scenes."""
    images, _ = ShapesDataset(ShapesConfig(split="val", textures=("solid",), sizes=("large",), scale=1.2), 32).batch(
        range(64)
    )
    scorer = feed(ShapesDistance(net, PROFILE, 64, torch.device("cpu")), to_uint8(images))
    scorer.reduce(None)
    assert values(scorer)["fd_shapes"] > 0.01 * values(scorer)["fd_shapes_clean"]


def test_the_oracle_reads_real_renders_and_counts_each_fault(reduce_together):
    images, labels = shapes(64)
    scorer = feed(OracleScorer(64), images, labels=labels)
    scorer.reduce(None)
    assert values(scorer) == pytest.approx(
        {"oracle_top1": 1, "oracle_shape": 1, "oracle_colour": 1, "oracle_extra": 0, "oracle_unread": 0}, abs=0.04
    )
    assert scorer.scores()[0].name == "oracle_top1-64[imgtok-shapes-1]"
    wrong_colour = feed(OracleScorer(64), images, labels=labels // 8 * 8 + (labels + 1) % 8)
    wrong_colour.reduce(None)
    found = values(wrong_colour)
    assert found["oracle_top1"] == found["oracle_colour"] == 0
    assert found["oracle_shape"] > 0.95
    blank = feed(OracleScorer(64), torch.full_like(images, 235), labels=labels)
    blank.reduce(None)
    assert values(blank)["oracle_unread"] == 1
    assert values(blank)["oracle_top1"] == values(blank)["oracle_shape"] == 0
    pair = [feed(OracleScorer(64), images, rank, 2, labels=labels) for rank in range(2)]
    reduce_together(*pair)
    assert values(pair[1]) == values(scorer)


def test_two_objects_are_not_one_sample_of_a_class():
    """The other object stands left of the first, so the largest is still read."""
    images, labels = shapes(16, size=48)
    pasted = torch.cat([images, images.flip(0)], dim=3)
    pasted = torch.nn.functional.pad(pasted, (0, 0, 24, 24), value=235)
    scorer = feed(OracleScorer(16), pasted, labels=labels)
    scorer.reduce(None)
    assert values(scorer)["oracle_top1"] == 0
    assert values(scorer)["oracle_extra"] == pytest.approx(1, abs=0.2)


def test_the_oracle_needs_labels(random_images):
    with pytest.raises(ValueError, match="labels=balanced"):
        feed(OracleScorer(4), random_images(4))


def test_reconstruction_scores(random_images, reduce_together):
    originals = random_images(9)
    images = originals.clone()
    images[:, :, 3:6] += 1
    scorer = feed(ReconstructionScorer(PixelScores(("ssim", "psnr", "mae", "oracle")), 9), images, originals=originals)
    scorer.reduce(None)
    found = values(scorer)
    assert set(found) == {"psnr", "ssim", "mae"}
    assert found["psnr"] > 30
    assert 0.5 < found["ssim"] < 1
    assert found["mae"] == pytest.approx(3 / 16)
    assert scorer.scores()[0].name == "PSNR-9[uint8, mean over images]"
    judge = PixelScores(("psnr", "ssim", "mae"))
    pair = [feed(ReconstructionScorer(judge, 9), images, r, 2, originals=originals) for r in range(2)]
    reduce_together(*pair)
    assert values(pair[0]) == found
    with pytest.raises(ValueError, match="psnr compare with originals"):
        feed(ReconstructionScorer(PixelScores(("psnr",)), 9), images)


# rFID


def test_rfid_is_the_distance_to_the_originals_of_the_same_pass(extractor, random_images, reduce_together):
    originals, images = random_images(41), random_images(41, seed=1)

    def scored(rank=0, processes=1, batch=7):
        side = OriginalsReference(extractor, 41)
        scorer = FeatureScorer(INCEPTION, ("rfid",), extractor, 41, None, originals=side)
        for part in (side, scorer):
            feed(part, images, rank, processes, batch, originals=originals)
        return side, scorer

    side, scorer = scored()
    side.reduce(None)
    scorer.reduce(None)
    expected = reference(extractor, images).pool.distance(reference(extractor, originals).pool)
    assert [score.name for score in scorer.scores()] == ["rFID-41[inception-v3-compat, own originals]"]
    assert values(scorer) == {"rfid": pytest.approx(expected)}
    pairs = [scored(rank, 2, batch=5) for rank in range(2)]
    reduce_together(*(side for side, _ in pairs))
    reduce_together(*(scorer for _, scorer in pairs))
    for _, half in pairs:
        assert values(half) == pytest.approx(values(scorer), rel=1e-6)


def test_rfid_of_the_originals_themselves_is_zero_and_needs_them(extractor, random_images):
    images = random_images(20)
    side = feed(OriginalsReference(extractor, 20), images, originals=images)
    scorer = feed(FeatureScorer(INCEPTION, ("rfid",), extractor, 20, None, originals=side), images, originals=images)
    side.reduce(None)
    scorer.reduce(None)
    assert values(scorer)["rfid"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="rfid compares with originals"):
        feed(OriginalsReference(extractor, 20), images)
    with pytest.raises(ValueError, match="rfid compares with originals"):
        FeatureScorer(INCEPTION, ("rfid",), extractor, 20, None)


# ------------------------------------------------------------------------------------------------ tokens


@pytest.fixture
def toytok() -> ToyTok:
    return ToyTok(ToyTokConfig())


def code_batches() -> list[ScoredBatch]:
    """Four images with 1, 2, 3 and 2 tokens; padding is 15, an id that is never meant."""
    ids = torch.tensor([[3, 15, 15], [3, 4, 15], [3, 4, 5], [3, 3, 15]])
    lengths, slots = torch.tensor([1, 2, 3, 2]), torch.tensor([[0, 9, 9], [1, 4, 9], [0, 1, 2], [7, 15, 15]])
    blank = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    tokens = Tokens(ids, lengths, slots)
    return [ScoredBatch(rows, blank[rows], tokens=tokens[rows]) for rows in ([0, 2], [1], [3])]


def test_tokens_bits_and_use_of_the_codebook(toytok):
    """Ids 3, 4 and 5 are seen 5, 2 and 1 times of 8."""
    scorer = CodeScorer(toytok, 4)
    for batch in code_batches():
        scorer.update(batch)
    scorer.reduce(None)
    slots = (math.log2(16) + 2 * math.log2(120) + math.log2(560)) / 4
    entropy = -(5 / 8 * math.log2(5 / 8) + 2 / 8 * math.log2(2 / 8) + 1 / 8 * math.log2(1 / 8))
    assert values(scorer) == pytest.approx(
        {"tokens": 2.0, "bits": 2 * 4 + 4 + slots, "codebook_use": 3 / 16, "codebook_perplexity": 2**entropy}
    )
    assert [score.name for score in scorer.scores()] == [
        "tokens-4[mean an image]",
        "bits-4[mean an image, log2(16) a token + log2(16) for their number + log2(16 over it) for their slots]",
        "codebook_use-4[share of 16 ids]",
        "codebook_perplexity-4[2^entropy of the ids]",
    ]


def test_images_of_a_fixed_length_cost_their_tokens_alone():
    config = FlexTokConfig(image_size=16, patch_size=4, num_registers=6, levels=(8, 5, 5))
    with torch.device("meta"):
        model = FlexTok(config)
    scorer = CodeScorer(model, 1)
    scorer.update(ScoredBatch([0], torch.zeros(1, 3, 16, 16), tokens=Tokens.full(torch.tensor([[7, 7, 9, 199]]))))
    assert values(scorer) == pytest.approx(
        {"tokens": 4, "bits": 4 * math.log2(200), "codebook_use": 3 / 200, "codebook_perplexity": 2**1.5}
    )


def test_a_vocabulary_beyond_counting_has_no_use(toytok, monkeypatch):
    monkeypatch.setattr(CodeScorer, "LARGEST", 15)
    scorer = CodeScorer(toytok, 4)
    for batch in code_batches():
        scorer.update(batch)
    assert list(values(scorer)) == ["tokens", "bits"]
    with pytest.raises(ValueError, match="not decoded from tokens"):
        scorer.update(ScoredBatch([0], torch.zeros(1, 3, 16, 16)))


def test_tokens_that_are_vectors_have_no_codebook_and_cost_their_numbers():
    transformer = TransformerConfig(width=16, depth=1, num_heads=2)
    base = VAEConfig(latent_channels=4, block_channels=(8, 8), norm_groups=4)
    sizes = {"max_tokens": 16, "budget": 16, "position_grid": 8, "token_width": 5}
    with torch.device("meta"):
        config = KARLConfig(
            image_size=16, encoder=transformer, decoder=transformer, base=base, quantized=False, **sizes
        )
        model = KARL(config)
    scorer = CodeScorer(model, 1)
    ids, slots = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[0, 3]])
    tokens = Tokens(ids, torch.tensor([2]), slots, torch.zeros(1, 2, 5))
    scorer.update(ScoredBatch([0], torch.zeros(1, 3, 16, 16), tokens=tokens))
    assert values(scorer) == pytest.approx({"tokens": 2, "bits": 2 * 32 * 5 + 4 + math.log2(120)})
    assert "32 x 5 a token" in scorer.scores()[1].name
