"""Configs: presets, overrides, the trip through JSON, and what is refused."""

import dataclasses
import json
import math

import pytest

from dopfn_jax.config import (
    Config,
    ConfigError,
    ModelConfig,
    PriorConfig,
    TableShape,
    TrainingConfig,
    WidePriorConfig,
    preset_names,
)

SHAPE = {"rows": 30, "context": [5, 20], "tasks": 4}
# No field at its default, so that one that is lost shows.
EVERYTHING = Config(
    prior=PriorConfig(
        min_nodes=3,
        max_nodes=6,
        max_hidden=1,
        case_study="backdoor",
        mechanisms=("tanh",),
        noise_families=("gumbel", "laplace"),
        root_scale=(0.5, 2.0),
        noise_scale=0.1,
        zero_effect_share=0.25,
        target="observational",
    ),
    wide=WidePriorConfig(
        graphs=("block",),
        density=(0.1, 1.0),
        mechanisms=("tree", "mlp"),
        noise_families=("laplace",),
        column_kinds=("binary",),
        hidden_share=0.1,
        max_hidden=2,
        post_treatment_share=0.2,
        max_post_treatment=1,
        assignments=("coin",),
        steepness=(1.0, 2.0),
        treated_rate=(0.2, 0.9),
        prognostic_share=0.1,
        effects=("zero",),
        effect_size=(0.1, 0.2),
        links=("tanh",),
        outcome_kinds=("binary",),
        mirrored_share=0.3,
        noise_ratio=(1.0, 1.5),
        heteroscedastic_share=0.5,
        missing_share=0.0,
        duplicate_share=1.0,
    ),
    model=ModelConfig(
        width=30,
        layers=1,
        heads=5,
        mlp_ratio=2,
        features_per_token=3,
        linear_fit=True,
        linear_tilt=True,
        buckets=7,
        uniform_border_share=0.5,
        compute_dtype="bfloat16",
        remat=True,
    ),
    training=TrainingConfig(
        steps=7,
        seed=3,
        shapes=(TableShape(20, (2, 5), 3), TableShape(40, (6, 39), 1, 0.5, (2, 7), 9)),
        effect_weight=0.5,
        average_effect_weight=0.25,
        outcome_draws=4,
        accumulate=2,
        optimizer="muon",
        learning_rate=0.1,
        warmup_steps=2,
        final_learning_rate_share=0.5,
        weight_decay=0.2,
        clip_norm=3.0,
        ema_decay=0.0,
        log_every=9,
        validate_every=0,
        validation=TableShape(12, (4, 6), 2),
        checkpoint_minutes=0.5,
    ),
)


def _fields(config) -> dict:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def test_json_round_trip():
    for section, default in _fields(Config()).items():
        for name, value in _fields(default).items():
            changed = getattr(getattr(EVERYTHING, section), name)
            assert changed != value, f"{name} is at its default"
    for config in (Config(), EVERYTHING):
        again = Config.from_dict(json.loads(config.to_json()))
        assert again == config
        # As equal configs do, they share what is compiled for them.
        assert hash(again) == hash(config)


def test_the_names_of_the_presets():
    papers = {"do_pfn", "do_pfn_short", "do_pfn_graph", "do_pfn_mixed", "dont_pfn"}
    assert papers | {"smoke"} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_from_any_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config.load(name)
    assert Config.from_dict(json.loads(config.to_json())) == config


def test_the_papers_presets_draw_the_papers_priors():
    prior = {name: Config.load(name).prior for name in preset_names()}
    assert prior["do_pfn"] == PriorConfig(min_nodes=4, max_nodes=10)
    assert prior["do_pfn_short"] == PriorConfig(min_nodes=3, max_nodes=5)
    families = ("gaussian", "laplace", "student_t", "gumbel")
    mixed = dataclasses.replace(prior["do_pfn_short"], noise_families=families)
    assert prior["do_pfn_mixed"] == mixed
    assert prior["do_pfn_graph"].case_study
    assert prior["dont_pfn"] == dataclasses.replace(prior["do_pfn"], target="observational")


def test_a_file_by_path_with_a_base(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('base = "smoke"\n[model]\nwidth = 64\n')
    smoke, mine = Config.load("smoke"), Config.load(path)
    assert mine.model == dataclasses.replace(smoke.model, width=64)
    assert (mine.prior, mine.training) == (smoke.prior, smoke.training)
    # Seen from the file that names it, not from where Python was started.
    (tmp_path / "further.toml").write_text('base = "mine.toml"\n[model]\nlayers = 5\n')
    further = Config.load(tmp_path / "further.toml")
    assert further.model == dataclasses.replace(smoke.model, width=64, layers=5)


def test_overrides_have_the_type_of_their_field():
    config = Config.load(
        "smoke",
        [
            "training.learning_rate=1e-2",
            "training.clip_norm = 2",
            "training.optimizer= adamw",
            "training.shapes=[{rows=30, context=[5, 20], tasks=4}]",
            "model.remat=true",
            "prior.case_study=backdoor",
            'prior.mechanisms=["tanh", "relu"]',
            "prior.root_scale=[1, 2]",
            "training.steps=5",
            "training.steps=6",
        ],
    )
    assert config.training.learning_rate == 0.01
    assert config.training.clip_norm == 2.0 and isinstance(config.training.clip_norm, float)
    assert config.training.optimizer == "adamw"
    assert config.training.shapes == (TableShape(rows=30, context=(5, 20), tasks=4),)
    assert config.model.remat is True
    assert config.prior.case_study == "backdoor"
    assert config.prior.mechanisms == ("tanh", "relu")
    assert config.prior.root_scale == (1.0, 2.0)
    assert config.training.steps == 6
    # All else is the preset's.
    assert config.model == dataclasses.replace(Config.load("smoke").model, remat=True)


def test_a_case_study_fixes_the_sizes_of_the_arrays():
    random = PriorConfig(max_nodes=9)
    assert (random.nodes, random.covariates) == (9, 7)
    fixed = PriorConfig(max_nodes=9, case_study="confounder_mediator")
    assert (fixed.nodes, fixed.covariates) == (4, 2)


@pytest.mark.parametrize(
    ("values", "field", "value", "remedy"),
    [
        # Unknown fields.
        ({"prior": {"max_node": 5}}, "prior.max_node", "5", "did you mean 'max_nodes'"),
        ({"MODEL": {}}, "MODEL", "{}", "did you mean 'model'"),
        (
            {"training": {"LEARNING_RATE": 1}},
            "training.LEARNING_RATE",
            "1",
            "did you mean 'learning_rate'",
        ),
        ({"model": {"zzz": 1}}, "model.zzz", "1", "known fields: width, layers"),
        ({"training": {"shapes": [SHAPE | {"row": 1}]}}, "training.shapes[0].row", "1", "'rows'"),
        # Missing fields.
        ({"training": {"validation": {"rows": 9}}}, "training.validation", "9", "'context'"),
        # Wrong types.
        ({"prior": 3}, "prior", "3", "expected a table"),
        ({"prior": {"min_nodes": "4"}}, "prior.min_nodes", "'4'", "expected int, got str"),
        ({"prior": {"min_nodes": 4.0}}, "prior.min_nodes", "4.0", "expected int, got float"),
        ({"prior": {"noise_scale": True}}, "prior.noise_scale", "True", "expected float"),
        ({"prior": {"root_scale": 2.0}}, "prior.root_scale", "2.0", "expected a list"),
        ({"prior": {"root_scale": [1.0]}}, "prior.root_scale", "[1.0]", "expected 2 values"),
        ({"prior": {"root_scale": [1, "2"]}}, "prior.root_scale[1]", "'2'", "expected float"),
        ({"prior": {"mechanisms": "tanh"}}, "prior.mechanisms", "'tanh'", "expected a list"),
        ({"model": {"remat": 1}}, "model.remat", "1", "expected bool"),
        ({"model": {"compute_dtype": "f32"}}, "model.compute_dtype", "'f32'", "'bfloat16'"),
        # Out of range.
        ({"prior": {"min_nodes": 1}}, "prior.min_nodes", "1", "2 or more"),
        ({"prior": {"max_nodes": 3}}, "prior.max_nodes", "3", "at least min_nodes = 4"),
        ({"prior": {"max_hidden": -1}}, "prior.max_hidden", "-1", "0 or more"),
        ({"prior": {"case_study": "door"}}, "prior.case_study", "'door'", "frontdoor_pearl"),
        ({"prior": {"mechanisms": []}}, "prior.mechanisms", "()", "at least one of identity"),
        ({"prior": {"mechanisms": ["sin"]}}, "prior.mechanisms", "'sin'", "relu"),
        ({"prior": {"noise_families": ["t"]}}, "prior.noise_families", "'t'", "student_t"),
        ({"prior": {"root_scale": [3, 1]}}, "prior.root_scale", "(3.0, 1.0)", "low <= high"),
        ({"prior": {"root_scale": [0, 1]}}, "prior.root_scale", "(0.0, 1.0)", "0 < low"),
        ({"prior": {"root_scale": [1, float("inf")]}}, "prior.root_scale", "inf", "finite"),
        ({"prior": {"noise_scale": -0.1}}, "prior.noise_scale", "-0.1", "0 or more"),
        ({"prior": {"zero_effect_share": 1.5}}, "prior.zero_effect_share", "1.5", "0 and 1"),
        ({"prior": {"zero_effect_share": float("nan")}}, "prior.zero_effect_share", "nan", "share"),
        ({"prior": {"target": "both"}}, "prior.target", "'both'", "'observational'"),
        ({"model": {"heads": 5}}, "model.heads", "5", "divide width = 192"),
        ({"model": {"heads": 0}}, "model.heads", "0", "1 or more"),
        ({"model": {"features_per_token": -1}}, "model.features_per_token", "-1", "per row"),
        ({"model": {"buckets": 3}}, "model.buckets", "3", "4 or more"),
        ({"model": {"uniform_border_share": 1}}, "model.uniform_border_share", "1.0", "below 1"),
        ({"training": {"steps": 0}}, "training.steps", "0", "1 or more"),
        ({"training": {"seed": -1}}, "training.seed", "-1", "0 or more"),
        ({"training": {"learning_rate": 0}}, "training.learning_rate", "0.0", "positive"),
        ({"training": {"clip_norm": float("inf")}}, "training.clip_norm", "inf", "finite"),
        ({"training": {"ema_decay": 1.0}}, "training.ema_decay", "1.0", "below 1"),
        ({"training": {"shapes": []}}, "training.shapes", "()", "at least one"),
        (
            {"training": {"shapes": [SHAPE | {"first_step": 5}]}},
            "training.shapes",
            "first_step=5",
            "whose first_step is 0",
        ),
        (
            {"training": {"shapes": [SHAPE, SHAPE | {"context": [5, 30]}]}},
            "training.shapes[1].context",
            "(5, 30)",
            "high < rows = 30",
        ),
        (
            {"training": {"validation": SHAPE | {"context": [1, 3]}}},
            "training.validation.context",
            "(1, 3)",
            "2 <= low",
        ),
        (
            {"training": {"validation": SHAPE | {"tasks": 0}}},
            "training.validation.tasks",
            "0",
            "1 or more",
        ),
        ({"training": {"shapes": [SHAPE | {"weight": 0}]}}, "shapes[0].weight", "0.0", "positive"),
        ({"training": {"effect_weight": -1}}, "training.effect_weight", "-1.0", "0 or more"),
        (
            {"training": {"average_effect_weight": 1}},
            "training.average_effect_weight",
            "1.0",
            "needs effect_weight above 0",
        ),
        ({"training": {"weight_decay": math.inf}}, "training.weight_decay", "inf", "and finite"),
        ({"training": {"seed": 2**32}}, "training.seed", "4294967296", "below 2 ** 32"),
        (
            {
                "training": {
                    "effect_weight": 1,
                    "shapes": [{"rows": 9, "context": [8, 8], "tasks": 1}],
                }
            },
            "training.effect_weight",
            "1.0",
            "two query rows or more",
        ),
    ],
)
def test_a_refusal_names_field_value_and_remedy(values, field, value, remedy):
    with pytest.raises(ConfigError) as error:
        Config.from_dict(values)
    name, _, rest = str(error.value).partition(" = ")
    assert name.endswith(field) and value in rest and remedy in rest, str(error.value)


@pytest.mark.parametrize("override", ["steps=3", "training.steps", "training=3", "=3", ".a=1"])
def test_a_malformed_override_is_refused(override):
    with pytest.raises(ConfigError, match=r"write section\.field=value"):
        Config.load("smoke", [override])


def test_an_override_of_an_unknown_field_or_of_a_wrong_type_is_refused():
    with pytest.raises(ConfigError, match=r"modle = {'width': 3}: .*did you mean 'model'"):
        Config.load("smoke", ["modle.width=3"])
    with pytest.raises(ConfigError, match=r"model\.width = 'wide': expected int"):
        Config.load("smoke", ["model.width=wide"])


def test_unusable_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'Smok'.*did you mean 'smoke'.*presets are .*do_pfn"):
        Config.load("Smok")
    with pytest.raises(ConfigError, match="neither a file nor a preset"):
        Config.load(tmp_path)
    path = tmp_path / "wrong.toml"
    for text, message in (
        ("[prior\n", "not a TOML file"),
        ("prior = 3\n", "prior = 3: expected a table"),
        ('base = "smoke"\nprior = 3\n', "prior = 3: expected a table"),
        ("base = 3\n", "'3': neither"),
        (f"base = {str(path)!r}\n", "leads back to itself"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Config.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a TOML file"):
        Config.load(path)
