from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from imgtok import flow, randomness
from imgtok.config import ConfigError
from imgtok.generators import xar_fast
from imgtok.generators.conditioning import ClassModulation
from imgtok.generators.entities import Cells, Patches, Scales, Subsamples, WholeImage
from imgtok.generators.xar import XAR, FlowSampling, XARConfig, plan_entities, xar_size
from imgtok.sections import Settings

ENTITIES = [Cells(height=2, width=2), Subsamples(side=2), Scales(sides=(1, 2, 4)), Patches(), WholeImage()]
SAMPLINGS = {
    "published": FlowSampling(steps=(3,), guidance=(2.0,)),
    "unguided": FlowSampling(steps=(3,), guidance=(1.0,)),
    "interval": FlowSampling(steps=(4,), guidance=(3.0,), interval=(0.3, 0.8)),
    "euler": FlowSampling(steps=(3,), guidance=(2.0,), solver="euler"),
    "adams": FlowSampling(steps=(3,), guidance=(2.0,), solver="adams"),
}
LABELS = torch.tensor([0, 4, -1])


def tiny(entities=ENTITIES[0], *, drop: float = 0.1, **changes) -> XAR:
    torch.manual_seed(0)
    config = XARConfig(
        latent_channels=3,
        grid=4,
        condition=ClassModulation(num_classes=5, drop=drop),
        entities=entities,
        width=32,
        depth=2,
        num_heads=2,
        **changes,
    )
    return XAR(config).eval()


def draw(model, sampling, labels=LABELS, indices=(3, 7, 11), *, plainly=False):
    generate = model.generate_plainly if plainly else model.generate
    return generate(labels, seed=1, indices=list(indices), sampling=sampling)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("entities", ENTITIES, ids=lambda e: e.kind)
def test_sampling_is_the_plain_algorithm(entities, sampling):
    model = tiny(entities)
    fast, plain = draw(model, sampling), draw(model, sampling, plainly=True)
    assert fast.shape == (3, 3, 4, 4)
    assert torch.allclose(fast, plain, atol=1e-5)


@pytest.mark.parametrize("guidance", [(1.0, 2.0, 0.5, 2.0), (2.0, 1.0, 1.0, 3.0), (1.0, 1.0, 1.0, 2.0)])
def test_a_null_branch_that_fell_behind_catches_up(guidance):
    model, sampling = tiny(), FlowSampling(steps=(3,), guidance=guidance)
    assert torch.allclose(draw(model, sampling), draw(model, sampling, plainly=True), atol=1e-5)


@pytest.mark.parametrize("solver", ["stochastic", "euler", "adams"])
def test_a_single_entity_is_the_plain_flow_model(solver):
    model, steps, scale = tiny(WholeImage()), 4, 2.5
    drawn = draw(model, FlowSampling(steps=(steps,), guidance=(scale,), solver=solver))
    noise = randomness.normal(1, [3, 7, 11], (steps, 16, 3), "entity 0").transpose(0, 1)

    @torch.no_grad()
    def velocity(x, step, t):
        """Nothing of the sampler: both conditions in full, no cache, no table."""
        labels = torch.cat([LABELS, torch.full((3,), model.null_class)])
        v_cond, v_null = model.velocity(x.repeat(2, 1, 1), torch.full((6, 1), t), labels).chunk(2)
        return flow.classifier_free_guidance(v_cond, v_null, scale)

    if solver == "stochastic":
        x = flow.stochastic_euler(velocity, noise[0], steps, list(noise[1:]))
    else:
        x = getattr(flow, solver)(velocity, noise[0], steps)
    assert torch.allclose(drawn, model.entities.join(x), atol=1e-6)


@pytest.mark.parametrize("entities", ENTITIES, ids=lambda e: e.kind)
def test_an_image_does_not_depend_on_its_batch(entities):
    model, sampling = tiny(entities), SAMPLINGS["published"]
    together, alone = draw(model, sampling), draw(model, sampling, LABELS[1:2], (7,))
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_an_image_does_not_tell_which_classes_were_drawn_beside_it():
    """To the bit, on a CPU, where the number of rows is the same."""
    model, sampling = tiny(), SAMPLINGS["published"]
    among_others = draw(model, sampling, torch.tensor([4, 1, 2]))
    among_its_own = draw(model, sampling, torch.tensor([4, 4, 4]))
    assert torch.equal(among_others[0], among_its_own[0])


@pytest.mark.parametrize("sampling", [SAMPLINGS["published"], SAMPLINGS["interval"]], ids=["published", "interval"])
def test_half_precision_in_the_network_alone(sampling, monkeypatch):
    """Fast equals plain under autocast too; the cache is of that precision, solver and latents are float32."""
    kept = []
    rows = xar_fast.KVCache.rows
    monkeypatch.setattr(xar_fast.KVCache, "rows", lambda self, *a: kept.append(self.keys[0].dtype) or rows(self, *a))
    model = tiny()
    exact = draw(model, sampling)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast, plain = draw(model, sampling), draw(model, sampling, plainly=True)
    assert kept[-1] == torch.bfloat16
    assert fast.dtype == torch.float32
    assert torch.allclose(fast, plain, atol=0.05)
    assert 1e-5 < (fast - exact).abs().max() < 0.1
    half = draw(model.to(torch.bfloat16), sampling)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.2


def test_null_rows_that_nothing_depends_on_are_not_computed(monkeypatch):
    rows: list[int] = []
    network = XAR.network

    def counting(self, x, *args, **options):
        rows.append(len(x))
        return network(self, x, *args, **options)

    monkeypatch.setattr(XAR, "network", counting)
    model = tiny()
    draw(model, FlowSampling(steps=(3,), guidance=(1.0,)))
    assert rows == [3] * 12
    rows.clear()
    draw(model, FlowSampling(steps=(3,), guidance=(2.0,)))  # 1 at the first of four cells
    assert rows == [3] * 3 + [6] * 9
    rows.clear()
    draw(model, FlowSampling(steps=(3,), guidance=(2.0,), interval=(0.0, 0.6)))  # called at 1, .52 and .04
    assert rows[:3] == [3, 3, 3]
    assert rows[3:].count(6) == 6 - 3, "where it caught up, the null branch is a call of its own"


def test_the_modulation_table_in_parts_is_the_table(monkeypatch):
    model, sampling = tiny(), SAMPLINGS["published"]
    whole = draw(model, sampling)
    monkeypatch.setattr(xar_fast, "MOST_NUMBERS", 1)  # one time at once
    assert torch.allclose(draw(model, sampling), whole, atol=1e-6)


def test_steps_may_differ_between_entities():
    model, calls = tiny(), []
    model.generate(
        LABELS,
        seed=0,
        indices=[0, 1, 2],
        sampling=FlowSampling(steps=(5, 4, 3, 2)),
        on_step=lambda step, latents: calls.append((step, int(latents[0].any(dim=0).sum()))),
    )
    positions = [4 * (entity + 1) for entity, count in enumerate((5, 4, 3, 2)) for _ in range(count)]
    assert calls == list(zip(range(1, 15), positions, strict=True))  # an entity of 4 positions after the other


def test_guidance_and_classes_change_what_is_drawn():
    model = tiny()
    base = draw(model, SAMPLINGS["published"])
    assert not torch.allclose(base[:2], draw(model, SAMPLINGS["unguided"])[:2], atol=1e-3)
    assert not torch.allclose(base, draw(model, SAMPLINGS["published"], torch.tensor([1, 2, 3])), atol=1e-3)
    assert torch.allclose(draw(model, SAMPLINGS["published"])[2], draw(model, SAMPLINGS["unguided"])[2], atol=1e-5), (
        "guiding no class away from no class does nothing"
    )


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    "entities",
    [
        pytest.param(entities, id=entities.kind, marks=[] if entities.kind == "cell" else [pytest.mark.slow])
        for entities in ENTITIES
    ],
)
def test_it_learns(entities):
    """A class that is a constant latent: the loss falls below what ignorance of the class allows.

    `test_training_is_the_plain_algorithm` has the loss and gradients of every kind of entity.
    """
    model = tiny(entities, dropout=0.0, drop=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(40):
        labels = torch.randint(0, 5, (16,), generator=generator)
        latents = (labels - 2.0)[:, None, None, None].expand(16, 3, 4, 4)
        loss = model(latents, labels, generator=generator).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_entities_see_only_earlier_ones():
    model = tiny().train()
    model.config = model.config.with_condition(drop=0.0)
    tokens = torch.randn(1, 16, 3)
    t, label = torch.full((1, 4), 0.5), torch.zeros(1, dtype=torch.long)
    model.eval()
    for velocity in (XAR.velocity, xar_fast.velocity):
        tokens = tokens.clone()
        before = velocity(model, tokens, t, label)
        tokens[:, 8:12] += 1  # the third entity
        changed = (velocity(model, tokens, t, label) - before).abs().sum(-1)[0] > 1e-6
        assert changed.tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize("most_looks", [0, 16])
@pytest.mark.parametrize("entities", ENTITIES, ids=lambda e: e.kind)
def test_training_is_the_plain_algorithm(monkeypatch, entities, most_looks):
    """Velocities, loss and gradients: one mask and a copy of the modulation for every token, or entity by entity."""
    monkeypatch.setattr(xar_fast, "MOST_LOOKS", most_looks)
    latents, labels = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2, -1])
    results = []
    for velocity in (xar_fast.velocity, XAR.velocity):
        with monkeypatch.context() as patched:
            patched.setattr(xar_fast, "velocity", velocity)
            model = tiny(entities)
            loss = model(latents, labels, generator=torch.Generator().manual_seed(0)).total
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.allclose(fast, plain, atol=1e-5) for fast, plain in zip(*results, strict=True))


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = tiny()
        if recompute:
            model.recompute_activations()
        model(torch.ones(2, 3, 4, 4), torch.tensor([1, 2]), generator=torch.Generator().manual_seed(0)).total.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_times_are_cut_to_whole_thousandths():
    model = tiny()
    label = torch.zeros(1, dtype=torch.long)
    a, b, c = (model.condition(torch.tensor([t]), label) for t in (0.5001, 0.5009, 0.501))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, atol=1e-6)
    model.config = replace(model.config, whole_times=False)
    assert not torch.allclose(*(model.condition(torch.tensor([t]), label) for t in (0.5001, 0.5009)), atol=1e-6)


@pytest.mark.parametrize(("times", "mean_of_square"), [("uniform", 1 / 3), ("logit_normal", 0.2934)])
def test_training_times(times, mean_of_square):
    t = tiny(times=times)._draw_times(20_000, torch.Generator().manual_seed(0))
    assert 0 <= t.min() <= t.max() <= 1
    assert t.square().mean().item() == pytest.approx(mean_of_square, abs=0.01)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(("name", "count"), [("B", 172_638_224), ("L", 608_397_968), ("H", 1_186_024_096)])
def test_published_sizes(name, count):
    with torch.device("meta"):
        model = XAR(xar_size(name))
    assert sum(p.numel() for p in model.parameters()) == count


def test_guidance_rises_from_one_over_the_entities():
    plans = plan_entities(FlowSampling(guidance=(2.5,)), 4)
    assert [plan.guidance for plan in plans] == pytest.approx([1, 1.5, 2, 2.5])
    assert [plan.steps for plan in plans] == [40] * 4
    assert [plan.ever_guided for plan in plans] == [False, True, True, True]
    assert [plan.guidance for plan in plan_entities(FlowSampling(guidance=(2.5,)), 1)] == [2.5]


def test_what_is_left_out_is_as_the_model_says():
    merged = Settings(guidance=3).over(FlowSampling(steps=(7,), guidance=(2.0,), solver="euler"))
    assert merged == FlowSampling(steps=(7,), guidance=(3.0,), solver="euler")


def test_the_defaults_are_those_of_the_published_model():
    assert FlowSampling() == xar_size("B").sampling
    assert (FlowSampling().steps, FlowSampling().guidance, FlowSampling().interval) == ((40,), (2.7,), (0, 1))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"steps": (1,)}, "steps: a stochastic flow sampler needs at least 2 steps, not 1"),
        ({"steps": (3, 3)}, "steps: 2 numbers for 4 entities; give one, or one for each entity"),
        ({"guidance": (1.0, 2.0, 3.0)}, "guidance: 3 numbers for 4 entities"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny(), FlowSampling(**sampling))
    with pytest.raises(ValueError, match=message):
        tiny(sampling=FlowSampling(**sampling))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guidance": (-0.5,)}, "guidance.*at least 0"),
        ({"steps": (0,)}, "steps.*at least 1"),
        ({"steps": ()}, "steps: give one number"),
        ({"interval": (0.8, 0.2)}, "interval"),
        ({"solver": "heun"}, "solver"),
    ],
)
def test_bad_sampling_is_refused(fields, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        FlowSampling(**fields)


def test_labels_outside_the_table_are_refused():
    with pytest.raises(ValueError, match=r"labels must lie in 0 to 4 \(or -1 or 5 for no class\), got 0 to 6"):
        draw(tiny(), SAMPLINGS["published"], torch.tensor([0, 6]), (0, 1))


def test_cells_that_do_not_tile_the_grid_are_refused():
    with pytest.raises(ValueError, match="entities.height: cells of 3 do not tile a grid of 4"):
        tiny(Cells(height=3, width=2))


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width: 30 must be a multiple of 4 num_heads = 8"):
        XARConfig(width=30, num_heads=2)


def test_it_is_saved_and_loaded(tmp_path):
    import imgtok

    model = tiny(Scales(sides=(1, 2, 4)))
    model.save_pretrained(tmp_path)
    loaded = imgtok.load(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(draw(loaded, SAMPLINGS["published"]), draw(model, SAMPLINGS["published"]))
