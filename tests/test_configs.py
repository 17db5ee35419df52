"""Every preset loads, is valid, and is of the size that its name and the authors' tables say."""

import dataclasses
import importlib
import pathlib

import pytest

from configs import imagenet, ladder, pile, released, tpu, transformer, zero_shot
from tokenformer_jax.config import read_config, validate
from tokenformer_jax.evaluation.settings import read_eval_config
from tokenformer_jax.growth.ladder import stages, with_budget
from tokenformer_jax.growth.recipes import check_growth
from tokenformer_jax.nn.layers import count_params
from tokenformer_jax.training.tasks import task_of

FILES = sorted(path.stem for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
VARIANTS = {
    "base": [None],
    "quickstart": ["small", "grown", "large", "longer"],
    "pile": list(pile.VARIANTS),
    "ladder": [*ladder.TOKENS, "all", "all_mesh", "early", "early_mesh"],
    "released": list(released.VARIANTS),
    "tpu": list(tpu.VARIANTS),
    "transformer": transformer.VARIANTS,
    "digits": ["small", "grown", "large", "vit"],
    "imagenet": list(imagenet.VARIANTS),
}
PRESETS = [(name, variant) for name, variants in VARIANTS.items() for variant in variants]
VOCABULARY = 50304

# name: layers, width, heads, tokens of query, key and value each, of the output, of the feed-forward (reference.md).
SIZES = {
    "pile_150m": (12, 768, 12, 768, 768, 3072),
    "pile_450m": (24, 1024, 16, 1024, 1024, 4096),
    "pile_900m": (32, 1280, 16, 1280, 1280, 5120),
    "pile_1b5": (40, 1536, 16, 1536, 1536, 6144),
    "ladder_124m": (12, 768, 12, 576, 576, 2304),
    "ladder_354m": (12, 768, 12, 2140, 2140, 8560),
    "ladder_757m": (12, 768, 12, 4850, 4850, 19400),
    "ladder_1b4": (12, 768, 12, 8620, 8620, 34480),
    "ladder_354m_mesh": (12, 768, 12, 2176, 2176, 8704),
    "ladder_757m_mesh": (12, 768, 12, 4864, 4864, 19456),
    "ladder_1b4_mesh": (12, 768, 12, 8704, 8704, 34816),
    "tpu_124m": (12, 768, 12, 576, 576, 2304),
    "tpu_354m": (12, 768, 12, 2140, 2140, 8560),
    "released_354m": (24, 1024, 16, 768, 768, 3072),
    "released_757m": (24, 1024, 16, 1792, 1792, 7168),
    "released_757m_120k": (24, 1024, 16, 1792, 1792, 7168),
}


def load(name, variant):
    get_config = importlib.import_module(f"configs.{name}").get_config
    return read_config((get_config(variant) if variant else get_config()).to_dict())


def count(name, variant):
    cfg = load(name, variant)
    return count_params(task_of(cfg).abstract_model(cfg.model)[1])


def formula(name):
    layers, width, _, qkv, out, ffn = SIZES[name]
    return layers * width * (6 * qkv + 2 * out + 2 * ffn) + VOCABULARY * width + 2 * width


def test_every_config_file_is_tested():
    assert sorted([*VARIANTS, "zero_shot"]) == [name for name in FILES if name != "__init__"]


@pytest.mark.parametrize("variant", ["none", "paper", "text", "python", "data"])
def test_every_evaluation_preset_is_valid(variant):
    settings = read_eval_config(zero_shot.get_config(variant).to_dict())
    assert bool(settings.task_names or settings.datasets) == (variant != "none")
    assert len(settings.task_names) == {"paper": 6, "text": 1, "python": 3}.get(variant, 0)
    assert f"| {variant} |" in zero_shot.__doc__


@pytest.mark.parametrize("name, variant", PRESETS)
def test_every_preset_is_valid_and_builds(name, variant):
    cfg = load(name, variant)
    assert count_params(task_of(cfg).abstract_model(cfg.model)[1]) > 0
    validate(dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, fsdp=16 if cfg.batch_size > 32 else 1)))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_authors_to_the_last_parameter(name):
    family, variant = name.split("_", 1)
    model = load(family, variant).model
    sizes = (model.num_layers, model.embed_dim, model.num_heads, model.qkv_tokens, model.out_tokens, model.ffn_tokens)
    assert sizes == SIZES[name]
    assert model.vocab_size == VOCABULARY
    assert model.context_length == (2048 if family == "pile" else 1024)
    assert count(family, variant) == formula(name)


@pytest.mark.parametrize(
    "name, millions, relative",
    [
        ("pile_150m", 150, 0.02),
        ("pile_450m", 450, 0.01),
        ("pile_900m", 900, 0.005),
        ("pile_1b5", 1587, 0.001),  # "1.5B" is its count without the embedding
        ("ladder_124m", 124, 0.005),
        ("ladder_354m", 354, 0.001),
        ("ladder_757m", 757, 0.005),
        ("ladder_1b4", 1310, 0.001),  # "1.4B" in the paper, whose table of sizes gives this
        ("released_354m", 354, 0.002),
        ("released_757m", 757, 0.002),
    ],
)
def test_names_agree_with_counts(name, millions, relative):
    assert formula(name) == pytest.approx(millions * 1e6, rel=relative)
    if name == "pile_1b5":
        assert formula(name) - VOCABULARY * 1536 == pytest.approx(1.5e9, rel=0.01)


@pytest.mark.parametrize("variant", [variant for variant in transformer.VARIANTS if not variant.endswith("_gpt")])
def test_a_transformer_has_exactly_its_tokenformers_parameters(variant):
    model, theirs = load("transformer", variant).model, load(*variant.split("_")).model
    assert model.projection == "linear"
    assert (model.num_layers, model.embed_dim, model.num_heads) == (
        theirs.num_layers,
        theirs.embed_dim,
        theirs.num_heads,
    )
    assert count("transformer", variant) == formula(variant)


@pytest.mark.parametrize("variant", transformer.WIDTHS)
def test_a_transformer_of_gpts_shape_is_as_near_as_said(variant):
    assert count("transformer", variant) == pytest.approx(formula(variant.removesuffix("_gpt")), rel=0.004)


@pytest.mark.parametrize(
    "name, small, large",
    [
        ("ladder", "124m", "354m"),
        ("ladder", "354m", "757m"),
        ("ladder", "757m", "1b4"),
        ("ladder", "124m", "354m_mesh"),
        ("ladder", "354m_mesh", "757m_mesh"),
        ("ladder", "757m_mesh", "1b4_mesh"),
        ("tpu", "124m", "354m"),
        ("released", "354m", "757m"),
        ("released", "354m", "757m_120k"),
        ("quickstart", "small", "grown"),
    ],
)
def test_a_rung_grows_from_the_one_below_with_steps_to_spare(name, small, large):
    before, after = load(name, small), with_budget([load(name, large)])[0]
    check_growth(before.model, after.model, after.grow.recipe)
    assert after.steps > before.steps
    assert after.optimizer.warmup_steps < after.steps - before.steps


@pytest.mark.parametrize("variant", [variant for variant in ladder.TOKENS if variant.endswith("_mesh")])
def test_mesh_rungs_divide_and_fill_tiles(variant):
    cfg = load("ladder", variant)
    validate(dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, fsdp=16, tensor=4)))
    assert cfg.model.qkv_tokens % 128 == cfg.model.out_tokens % 128 == cfg.model.ffn_tokens % 128 == 0


@pytest.mark.parametrize("name", [name for name, variants in VARIANTS.items() if variants != [None]])
def test_an_unknown_variant_names_the_known_ones(name):
    with pytest.raises(ValueError) as error:
        load(name, "huge")
    assert "'huge'" in str(error.value) and all(variant in str(error.value) for variant in VARIANTS[name])


@pytest.mark.parametrize("column", ["", "_mesh"])
def test_the_ladder_in_one_run_is_that_of_its_rungs(column):
    plan = stages(load("ladder", f"all{column}"))
    rungs = [load("ladder", name) for name in ("124m", f"354m{column}", f"757m{column}", f"1b4{column}")]
    assert [stage.model for stage in plan] == [rung.model for rung in rungs]
    assert [stage.steps for stage in plan] == [rung.steps for rung in rungs]
    assert [stage.optimizer for stage in plan] == [rung.optimizer for rung in rungs]
