"""A generator with its decoder: several token counts from one draw, and what a user calls from Python."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

import imgtok
from imgtok.cli import main
from imgtok.generators.conditioning import TextPrefix
from imgtok.generators.entities import Cells, Scales
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.pipeline import Pipeline, class_numbers, write_cards
from imgtok.generators.sampling import TokenSampling
from imgtok.generators.xar import XAR, XARConfig
from imgtok.sample.evaluate.sources import GeneratorSource
from imgtok.tokenizers.base import Rate, Tokenizer
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig
from imgtok.tokenizers.vae import VAE, VAEConfig

SAMPLING = TokenSampling(guidance=2.0, top_k=12)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    torch.manual_seed(0)
    trunk = TrunkConfig(width=32, depth=1, head_dim=16)
    tokenizer = FlexTok(
        FlexTokConfig(image_size=16, num_registers=8, patch_size=4, levels=(4, 4), encoder=trunk, decoder=trunk)
    )
    for parameter in tokenizer.parameters():  # a decoder at its start does not look at the tokens
        torch.nn.init.normal_(parameter, std=0.2)
    generator = GPT(
        GPTConfig(vocab_size=16, num_tokens=8, width=32, depth=2, num_heads=2).with_condition(num_classes=5)
    )
    torch.nn.init.normal_(generator.head.weight, std=0.5)
    return Pipeline(generator, tokenizer, device="cpu", exact=True)


def test_a_longer_draw_begins_with_the_shorter_one(pipeline):
    labels = torch.arange(16) % 5
    drawn = {
        count: pipeline.generator.generate(labels, seed=3, indices=range(16), sampling=SAMPLING, num_tokens=count).ids
        for count in (1, 2, 5, 8)
    }
    for count, ids in drawn.items():
        assert ids.shape == (16, count)
        assert torch.equal(ids, drawn[8][:, :count])
    assert len(drawn[8].unique()) > 4  # not one token over and over


def test_a_control_reaches_the_generator(pipeline):
    steps = []

    def control(step, reading):
        steps.append(step)
        return replace(reading, prefix=-reading.prefix) if step == 4 else None

    plain, found = (pipeline.tokens([1, 2], seed=5, guidance=1.0, **how) for how in ({}, {"control": control}))
    assert steps == list(range(8))
    assert torch.equal(found.ids[:, :4], plain.ids[:, :4])
    assert not torch.equal(found.ids, plain.ids)
    assert len(pipeline([1, 2], seed=5, control=control)) == 2


def test_a_way_of_decoding_is_said_in_words(pipeline):
    """Though `decoding` is also what the settings of the decoder are called."""
    images = pipeline([1, 2, 3], decoding="coupled", window=4, seed=5, steps=1)
    assert images.tokens.calls.summary()["accepted_by_token"][0] is None, "the first token is not guessed"
    took = pipeline.tokens([1, 2, 3], decoding="coupled", window=4, seed=5).calls
    assert torch.equal(took.calls, images.tokens.calls.calls)
    assert (took.seconds > 0).all()
    exact = pipeline([1, 2, 3], seed=5, decoding={"steps": 1}).tokens.calls.summary()
    assert (exact["images"], exact["calls"], exact["tokens_per_call"]) == (3, 8, 1)
    with pytest.raises(ValueError, match=r"sampling.decoding: given 'fast', must be"):
        pipeline([1], decoding="fast")


def test_images_at_each_count_are_those_drawn_with_so_many_tokens(pipeline):
    indices, labels = range(4, 24), [index % 5 for index in range(4, 24)]
    settings = {"seed": 3, "sampling": SAMPLING, "decoding": FlexTokDecoding(steps=2)}
    found = pipeline.images_at((1, 4, 8), labels, indices, **settings)
    assert list(found) == [1, 4, 8]
    for count, (images, drawn) in found.items():
        assert drawn.ids.shape == (20, count)
        alone = pipeline.images(labels, indices, num_tokens=count, **settings)
        assert images.dtype == torch.uint8
        assert torch.equal(images, alone)
    assert torch.equal(found[8].images, pipeline.images(labels, indices, **settings))
    assert not torch.equal(found[1].images, found[8].images)


def test_a_count_that_is_asked_for_twice_is_drawn_once(pipeline):
    settings = {"seed": 3, "sampling": SAMPLING, "decoding": FlexTokDecoding(steps=2)}
    twice = pipeline.images_at([2, 2], [1, 3], range(2), **settings)
    once = pipeline.images_at([2], [1, 3], range(2), **settings)
    assert list(twice) == [2]
    assert torch.equal(twice[2].images, once[2].images)
    source = GeneratorSource(pipeline, 3, [0, 1], [Rate(4), Rate(4)], seed=0, decoding=FlexTokDecoding(steps=2))
    assert source.rates == (Rate(4),)
    (versions,) = source.batches(range(3), 3)
    assert {rate: len(batch.images) for rate, batch in versions.items()} == {Rate(4): 3}


def test_counts_are_those_that_the_tokenizer_decodes_too(pipeline, monkeypatch):
    pipeline.check_counts([1, 3, 7, 8, None])  # any prefix, not only those that a report shows
    monkeypatch.setattr(FlexTok, "rates", Tokenizer.rates)
    monkeypatch.setattr(FlexTok, "check_rate", Tokenizer.check_rate)  # as one whose images all have 8
    pipeline.check_counts([8, None])
    message = "num_tokens: 3 cannot be decoded: .*this tokenizer does not have the rate 3; it has 8"
    with pytest.raises(ValueError, match=message):
        pipeline(classes=[1], num_tokens=3)
    with pytest.raises(ValueError, match=message):
        GeneratorSource(pipeline, 3, [0], [Rate(3)], seed=0)


def test_rows_go_by_what_one_call_of_the_network_computes(pipeline):
    assert pipeline.generator.positions_at_once == 1
    assert pipeline.blocks.rows == 16
    options = {"latent_channels": 4, "grid": 16, "width": 32, "depth": 1, "num_heads": 2}
    for entities, rows in ((Cells(height=8, width=8), 4), (Scales(sides=(4, 8, 16)), 3)):
        xar = XAR(XARConfig(entities=entities, **options))
        assert xar.positions_at_once == xar.entities.length
        vae = VAE(VAEConfig(latent_channels=4, block_channels=(8, 8), layers_per_block=1, norm_groups=4))
        assert Pipeline(xar, vae, device="cpu", exact=True).blocks.rows == rows


# ---------------------------------------------------------------- from Python


def arrays(pictures) -> np.ndarray:
    return np.stack([np.array(picture) for picture in pictures]).astype(int)


def test_classes_become_pictures(pipeline):
    pictures = pipeline(classes=[1, 3], num_per_condition=2, seed=3)
    assert [picture.size for picture in pictures] == [(16, 16)] * 4
    assert len(np.unique(arrays(pictures), axis=0)) == 4
    expected = pipeline.images([1, 1, 3, 3], range(4), seed=3)
    assert np.array_equal(arrays(pictures), expected.permute(0, 2, 3, 1).numpy())
    alone = pipeline(classes=3, seed=3, indices=[2])  # an image is what its class, seed and index say
    assert np.array_equal(arrays(alone), arrays(pictures[2:3]))
    none = pipeline(classes=-1, seed=3, indices=[2])
    assert not np.array_equal(arrays(none), arrays(alone))


def test_settings_go_to_the_model_that_has_them(pipeline):
    sampling, decoding = pipeline.settings({"temperature": 0.5, "steps": 2, "guidance": 3}, {"guidance": 2.0})
    assert sampling == TokenSampling(temperature=0.5, guidance=3.0)  # a name of both is the generator's
    assert decoding == FlexTokDecoding(steps=2, guidance=2.0)
    base = arrays(pipeline(classes=[1], steps=2))
    for change in ({"steps": 3}, {"temperature": 0.2}, {"guidance": 4.0}, {"decoding": {"guidance": 4.0}}):
        assert (arrays(pipeline(classes=[1], **{"steps": 2} | change)) != base).any(), change


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"temperatur": 1},
            "temperatur: no setting .*; did you mean 'temperature'. sampling has: temperature",
        ),
        ({"flow": 1}, r"flow: no setting of these models\. sampling has: .*; decoding has: steps, guidance"),
        ({"num": 4}, "num: no setting of these models; did you mean 'num_per_condition'. sampling has: "),
        ({"batchsize": 4}, "batchsize: no setting of these models; did you mean 'batch_size'. sampling has: "),
        ({"top_p": 0}, "sampling.top_p: given 0, must be a number above 0"),
        ({"decoding": {"steps": 0}}, "decoding.steps: given 0"),
        ({"decoding": {"top_p": 0.5}}, "decoding has no field 'top_p'"),
        ({"classes": [5]}, "classes: 5 is not a class of the model; it has classes 0 to 4"),
        ({"classes": []}, "nothing to draw: 0 classes"),
        ({"classes": None}, "draws classes: give classes="),
        ({"prompts": "a red circle"}, "draws classes: give classes="),
        ({"classes": "a red circle"}, "draws classes: give classes="),
        ({"classes": ["a red circle"]}, "draws classes: give classes="),
        ({"num_tokens": 9}, r"num_tokens: the generator draws 1 to 8 tokens, given \[9\]"),
        ({"indices": [1, 2]}, "indices: 2 numbers for 1 images"),
    ],
)
def test_a_request_that_cannot_be_served_is_named(pipeline, asked, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**{"classes": [1]} | asked)


def test_one_may_stop_before_decoding_and_go_on(pipeline):
    tokens = pipeline.tokens(classes=[1, 2, 3], seed=5, temperature=0.8)
    assert tokens.ids.shape == (3, 8)
    whole = pipeline(classes=[1, 2, 3], seed=5, temperature=0.8, steps=2)
    assert np.array_equal(arrays(pipeline.decode(tokens, seed=5, steps=2)), arrays(whole))
    first = pipeline(classes=[1, 2, 3], seed=5, temperature=0.8, steps=2, num_tokens=2)
    assert np.array_equal(arrays(pipeline.decode(tokens.truncate(2), seed=5, steps=2)), arrays(first))
    assert pipeline.tokens(classes=[1], num_tokens=3).ids.shape == (1, 3)
    for name, hint in (("num", "; did you mean 'num_per_condition'?"), ("flow", ".")):
        with pytest.raises(
            ValueError, match=re.escape(f"{name}: no setting of the generator{hint} sampling has: temp")
        ):
            pipeline.tokens(classes=[1], **{name: 4})
    with pytest.raises(ValueError, match=r"draws tokens and not latents: call pipe\.tokens"):
        pipeline.latents(classes=[1])


def test_many_images_go_in_batches(pipeline, monkeypatch):
    seen = []
    generate = GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda self, c, **rest: seen.append(len(c)) or generate(self, c, **rest))
    monkeypatch.setattr(pipeline, "exact", False)
    whole = arrays(pipeline(classes=[1], num_per_condition=5, steps=2))
    assert np.abs(arrays(pipeline(classes=[1], num_per_condition=5, steps=2, batch_size=2)) - whole).max() <= 1
    assert seen == [5, 2, 2, 1]


def test_a_callback_sees_what_the_images_become(pipeline):
    steps = []
    final = pipeline(classes=[1, 2], steps=4, callback=lambda step: steps.append((step, step.images())))
    assert [(step.stage, step.done) for step, _ in steps] == [
        *(("draw", count) for count in range(1, 9)),
        *(("decode", count) for count in range(1, 5)),
    ]
    assert all(images == [] for step, images in steps if step.stage == "draw")
    far, near = (np.abs(arrays(steps[place][1]) - arrays(final)).mean() for place in (8, 11))
    assert near <= 1 < far  # the last guess is the image
    assert list(steps[-1][0].indices) == [0, 1]


def test_a_bar_is_shown_where_it_is_wanted(pipeline, capsys):
    pipeline(classes=[1], steps=2)
    assert capsys.readouterr().err == ""  # no terminal
    pipeline(classes=[1], steps=2, progress=True)
    assert "1/1" in capsys.readouterr().err
    pipeline(classes=[1], steps=2, progress=False)
    assert capsys.readouterr().err == ""


def test_device_and_dtype_are_said_in_text(pipeline):
    pipe = Pipeline(pipeline.generator, pipeline.decoder, device="cpu", dtype="bfloat16")
    assert (pipe.device, pipe.dtype, pipe.precision) == (torch.device("cpu"), torch.bfloat16, "bf16")
    seen = []
    hook = pipe.generator.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    pipe(classes=[1], steps=2)
    assert set(seen) == {torch.bfloat16}
    assert pipe.to(torch.bfloat16) is pipe.to("cpu")
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert pipe.to("cpu", "float32") is pipe
    pipe(classes=[1], steps=2)
    assert seen[-1] == torch.float32
    hook.remove()
    with pytest.raises(ValueError, match="dtype: given 'int8', must be one of float32, bfloat16, float16"):
        pipe.to(dtype="int8")


def test_a_decoder_must_fit(pipeline):
    with pytest.raises(ValueError, match="draws tokens, which a VAE does not decode"):
        Pipeline(pipeline.generator, VAE(VAEConfig(block_channels=(8,), norm_groups=4)), device="cpu")


# ---------------------------------------------------------------- on the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A Hub in a folder: repositories are made and filled, and files that match are downloaded from them."""
    root = tmp_path / "hub"

    def upload(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def download(name, *, revision, allow_patterns):
        files = [str(path.relative_to(root / name)) for path in (root / name).rglob("*") if path.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (tmp_path / "cache" / name / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name / file, tmp_path / "cache" / name / file)
        return str(tmp_path / "cache" / name)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **rest: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, **rest: SimpleNamespace(sha="1"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return root


def test_a_repository_of_ours_draws_by_its_name_alone(pipeline, hub, capsys):
    assert pipeline.push_to_hub("someone/shapes", private=True) == "https://hub/someone/shapes/commit/1"
    pipe = imgtok.pipeline("someone/shapes", device="cpu", exact=True)
    assert np.array_equal(arrays(pipe(classes=[1], steps=2)), arrays(pipeline(classes=[1], steps=2)))
    card = (hub / "someone/shapes/README.md").read_text()
    assert 'pipe = imgtok.pipeline("someone/shapes")' in card
    assert "pipe(classes=[0, 1], seed=0)" in card
    assert card.startswith("---\nlibrary_name: imgtok\npipeline_tag: unconditional-image-generation\n")
    inside = (hub / "someone/shapes/tokenizer/README.md").read_text()
    assert 'decoder = imgtok.pipeline("someone/shapes").decoder' in inside
    assert "/tmp" not in card + inside
    code = card.split("```python")[1].split("```")[0]
    made = {}
    exec(code, made)
    assert len(made["images"]) == 2
    assert main(["sample", "someone/shapes", "num=2", "out=drawn", "decoding.steps=2"]) == 0
    assert main(["info", "someone/shapes"]) == 0
    said = capsys.readouterr().out
    assert "  sampling.temperature: a number of at least 0 [1.0]\n      Divides the logits" in said
    assert "  decoding.steps: an integer of at least 1 [25]" in said


def test_a_generator_is_not_uploaded_without_its_decoder(pipeline, hub):
    with pytest.raises(ValueError, match=r"imgtok\.pipeline\(FOLDER, tokenizer=\.\.\.\)\.push_to_hub\('someone/gpt'\)"):
        pipeline.generator.push_to_hub("someone/gpt")
    assert not hub.exists()


def test_the_card_of_a_generator_that_reads_text(tmp_path):
    condition = TextPrefix(text_width=12, text_length=4)
    generator = GPTConfig(vocab_size=16, num_tokens=8, width=32, depth=1, num_heads=2, condition=condition)
    write_cards(tmp_path, "someone/text", generator, VAEConfig())
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: text-to-image\n" in card
    assert "pipe(prompts='a red circle above a blue square', seed=0)" in card


def test_a_hub_that_refuses_is_named(pipeline, monkeypatch):
    def refuse(self, name, **rest):
        raise RuntimeError("401 Client Error")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ConnectionError, match="could not push to 'someone/shapes' .*401 Client Error"):
        pipeline.push_to_hub("someone/shapes")


def test_the_help_of_a_job_lists_the_settings_of_its_model(pipeline, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path / "model")
    for command in (["sample", str(tmp_path / "model")], ["evaluate", f"model={tmp_path / 'model'}"]):
        assert main([*command, "--help"]) == 0
        assert capsys.readouterr().out.count("  sampling.top_k [0] ") == 1
        assert main([*command, "--help", "sampling.top_k"]) == 0
        said = capsys.readouterr().out
        assert said.startswith("  sampling.top_k: an integer of at least 0 [0]\n")
        assert "sampling.temperature" not in said
        assert main([*command, "--help", "all"]) == 0
        said = capsys.readouterr().out
        assert "Fields: what each must be [default]" in said
        assert said.count("  sampling.top_k: an integer of at least 0 [0]\n") == 1
        assert said.count("  decoding.solver: one of 'euler', 'adams' ['euler']\n") == 1
    assert main(["reconstruct", str(tmp_path / "model/tokenizer"), "--help"]) == 0
    said = capsys.readouterr().out
    assert "decoding.solver" in said
    assert "sampling." not in said
    (tmp_path / "job.yaml").write_text(f"job: sample\nmodel: {tmp_path / 'model'}\n")
    assert main(["sample", str(tmp_path / "job.yaml"), "--help", "all"]) == 0
    assert "  sampling.top_k: an integer of at least 0 [0]\n" in capsys.readouterr().out
    (tmp_path / "job.yaml").write_text("job: sample\nmodel: nowhere/final/yet\n")
    assert main(["sample", str(tmp_path / "job.yaml"), "--help"]) == 0
    assert "job.yaml names a model that is not there yet" in capsys.readouterr().out
    assert main(["sample", "--help"]) == 0
    assert "decoding.solver" not in capsys.readouterr().out


# ---------------------------------------------------------------- classes by name


def test_classes_have_numbers_and_names(caplog):
    names = ("cat", "dog", "10")
    assert class_numbers([1, "cat", -1, "10"], 3, names) == [1, 0, -1, 2]
    with pytest.raises(ValueError, match="no class of this model is called 'dogs'; did you mean 'dog'"):
        class_numbers(["dogs"], 3, names)
    with pytest.raises(ValueError, match="called 'xyz'; it has cat, dog, 10"):
        class_numbers(["xyz"], 3, names)
    with pytest.raises(ValueError, match="training data had none; give numbers"):
        class_numbers(["cat"], 3)
    assert class_numbers([10], 11, [*names, *"abcdefgh"]) == [10]
    assert "that which is called '10' is number 2" in caplog.text


def test_a_pipeline_draws_a_class_by_its_name(pipeline):
    known = pipeline.generator.config
    pipeline.generator.config = known.with_condition(classes=("ant", "bee", "cow", "dog", "eel"))
    try:
        assert torch.equal(pipeline.tokens("cow", seed=3).ids, pipeline.tokens(2, seed=3).ids)
        assert pipeline.class_names[1] == "bee"
    finally:
        pipeline.generator.config = known


def test_names_of_classes_are_as_many_as_there_are_at_most():
    config = GPTConfig().with_condition(num_classes=2, classes=("ant",))
    assert config.class_names == ("ant",)
    with pytest.raises(ValueError, match="classes: 3 names, such as 'a', for num_classes = 2"):
        config.with_condition(classes=("a", "b", "c"))
