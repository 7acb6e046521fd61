import pytest
from transformers import LlamaConfig

from dflash_train.config import (
    DataConfig,
    DrafterSettings,
    EvaluateConfig,
    LossConfig,
    OptimConfig,
    SampleTrafficConfig,
    TrainingConfig,
    compose,
    to_plain,
)
from dflash_train.drafter.config import DrafterConfig, spread_target_layer_ids
from dflash_train.testing import tiny_llama_config


def test_a_recipe_composes_with_overrides():
    config = compose(["recipe=smollm2", "optim.lr=0.01", "name=mine"])
    assert config.optim.lr == 0.01
    assert config.run_dir.parts == ("runs", "mine")
    assert to_plain(config)["target"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_stepz=3", "max_stepz"),
        ("optim.lr=fast", "optim.lr"),
        ("recipe=nothing", "nothing"),
        ("training.num_anchors=0", r"training\.num_anchors \(=0\)"),
        ("target.dtype=float8", "target.dtype"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(override: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        compose([override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DrafterSettings(block_size=1), r"drafter\.block_size \(=1\)"),
        (lambda: DrafterSettings(num_hidden_layers=0), r"drafter\.num_hidden_layers"),
        (lambda: DrafterSettings(num_taps=0), r"drafter\.num_taps"),
        (lambda: SampleTrafficConfig(requests=0), r"data\.sample\.requests"),
        (lambda: DataConfig(batch_size=0), r"data\.batch_size"),
        (lambda: DataConfig(test_share=1.5), r"data\.test_share"),
        (lambda: DataConfig(test_share=0.95), "leave nothing to train on"),
        (lambda: TrainingConfig(max_steps=0), r"training\.max_steps"),
        (lambda: TrainingConfig(max_steps=1, minutes=1.0), r"training\.max_steps.*minutes"),
        (lambda: LossConfig(decay_gamma=0.0), r"loss\.decay_gamma"),
        (lambda: LossConfig(ce=0.0), r"loss\.ce"),
        (lambda: OptimConfig(lr=0.0), r"optim\.lr"),
        (lambda: OptimConfig(warmup_share=1.0), r"optim\.warmup_share"),
        (lambda: OptimConfig(max_grad_norm=0.0), r"optim\.max_grad_norm"),
        (lambda: EvaluateConfig(live_traffic=-1), r"evaluate\.live_traffic"),
    ],
)
def test_each_check_names_its_field(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("num_layers", "num_taps", "expected"),
    [
        (28, 5, [1, 7, 13, 19, 25]),
        (30, 5, [1, 8, 14, 20, 27]),
        (32, 5, [1, 8, 15, 22, 29]),
        (36, 5, [1, 9, 17, 25, 33]),
        (40, 5, [1, 10, 19, 28, 37]),
        (48, 5, [1, 12, 23, 34, 45]),
        (64, 5, [1, 16, 31, 46, 61]),
        (28, 3, [1, 13, 25]),
        (30, 3, [1, 14, 27]),
        (30, 1, [15]),
    ],
)
def test_tap_layers_follow_the_published_rule(num_layers: int, num_taps: int, expected: list[int]):
    assert spread_target_layer_ids(num_layers, num_taps) == expected


def test_a_drafter_takes_its_shapes_from_the_target_unless_told():
    settings = DrafterSettings(num_taps=2, mask_token_id=3, intermediate_size=48)
    config = DrafterConfig.for_target(settings, tiny_llama_config())
    assert (config.hidden_size, config.head_dim, config.intermediate_size) == (32, 8, 48)
    assert config.target_layer_ids == [1, 3]
    assert config.rope_parameters == dict(tiny_llama_config().rope_parameters or {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DrafterSettings(mask_token_id=260, num_taps=2), r"drafter\.mask_token_id \(=260\)"),
        (DrafterSettings(mask_token_id=3, target_layer_ids=[1, 1]), "distinct"),
        (DrafterSettings(mask_token_id=3, target_layer_ids=[5]), r"target_layer_ids \(=\[5\]\)"),
        (DrafterSettings(mask_token_id=3, num_taps=5), r"drafter\.num_taps \(=5\)"),
        (
            DrafterSettings(mask_token_id=3, num_taps=2, num_attention_heads=3),
            r"drafter\.num_attention_heads \(=3\)",
        ),
    ],
)
def test_a_drafter_that_does_not_fit_its_target_is_refused(settings: DrafterSettings, message: str):
    target: LlamaConfig = tiny_llama_config()
    with pytest.raises(ValueError, match=message):
        DrafterConfig.for_target(settings, target)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.kl=0.5"], r"loss\.kl \(above 0\).*data\.teacher_top_k \(=0\)"),
        (
            ["training.head_sample=9", "drafter.draft_vocab_size=40"],
            r"head_sample.*draft_vocab_size",
        ),
        (["training.max_steps=null"], r"training\.max_steps.*training\.minutes"),
        (["loss.weighting=dpace", "loss.decay_gamma=4"], r"loss\.decay_gamma.*loss\.weighting"),
        (["optim.decay_share=1.0"], r"optim\.decay_share"),
        (["training.ema_decay=1.0"], r"training\.ema_decay"),
    ],
)
def test_settings_that_do_not_go_together_are_named(overrides: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        compose(["recipe=smollm2", *overrides])


def test_the_published_mix_of_dspark_is_a_recipe():
    mix = ["loss.ce=0.1", "loss.tv=1.8", "loss.confidence=1.0", "loss.decay_gamma=4"]
    shape = ["drafter.markov_rank=256", "drafter.has_confidence_head=true"]
    config = compose(["recipe=qwen3", *mix, *shape, "data.teacher_top_k=8"])
    assert config.loss.soft_names == ["tv"]


def test_an_override_that_cannot_be_parsed_is_a_user_error() -> None:
    with pytest.raises(ValueError, match=r"hub:org/name#part"):
        compose(["recipe=smollm2", "data.logs=hub:org/name#part/train"])
