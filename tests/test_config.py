"""The configuration: one clear error per bad value, and a JSON form that never changes its meaning silently."""

import json
import math

import pytest

from effilora_diffusion.core import EffiLoRAConfig, EffiLoRAError, ReducerConfig
from effilora_diffusion.core.config import heads_text

NAN, INF = float("nan"), float("inf")

BAD = [
    *[("rank", value) for value in (0, -1, 4097, 1.5, True, "4")],
    *[("heads", value) for value in (0, 65, 2.0, False)],
    *[("alpha", value) for value in (0, -1.0, NAN, INF, 1e-7, 1e7, 10**400, "4", [4], True)],
    *[("timestep_range", value) for value in (0, -1.0, NAN, INF, 1e-7, 1e10, "1000", None)],
    *[("routing", value) for value in ("", "Token", None, "soft")],
    *[("a_sharing", value) for value in ("layer", None)],
    *[("scaling", value) for value in ("rsLoRA", "")],
    *[("dropout", value) for value in (-0.1, 1, 1.0, NAN, "0.1", {}, False)],
    *[
        ("target_modules", value)
        for value in ("to_q", (), [], ("to_q", ""), ("to_q", 3), {"to_q": 1}, 5, ["x" * 301], ["a\x1b"])
    ],
]
BAD_REDUCER = [
    *[("mode", value) for value in ("on", None, "Importance")],
    *[("active", value) for value in (0, -0.5, 1.01, NAN, "half", True)],
    *[("interval", value) for value in (0, -3, 1.5, True, 10**10)],
    *[("warmup", value) for value in (-1, 0.5, False, 10**10)],
    *[("rollouts", value) for value in (1, 0, 2.0, 10_001)],
    *[("suppress_share", value) for value in (0, 1, -0.1, NAN, "0.5")],
    *[("suppress_factor", value) for value in (-0.1, 1, NAN, [0])],
    *[("step_size", value) for value in (0, -1, NAN, INF, 1e7, "1")],
    *[("train_shared", value) for value in (1, "yes", None)],
]


def full_config():
    """No option at its default."""
    reducer = ReducerConfig(
        mode="importance",
        active=0.25,
        interval=7,
        warmup=3,
        rollouts=4,
        suppress_share=0.3,
        suppress_factor=0.2,
        step_size=0.5,
        train_shared=True,
    )
    return EffiLoRAConfig(
        rank=6,
        alpha=2.5,
        heads=2,
        routing="timestep",
        a_sharing="slice",
        target_modules=("to_q", "ff.net.2"),
        dropout=0.1,
        scaling="rslora",
        reducer=reducer,
    )


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_with_its_option_named(name, value):
    with pytest.raises(EffiLoRAError, match=name):
        EffiLoRAConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_REDUCER)
def test_a_bad_reducer_value_is_refused_with_its_option_named(name, value):
    with pytest.raises(EffiLoRAError, match=f"reducer .*{name}"):
        ReducerConfig(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1, "heads": 1, "dropout": 0.0},
        {"rank": 4096, "heads": 64, "dropout": 0.99, "alpha": 1e-3},
        {"alpha": 7, "target_modules": ["to_q"]},
        {"reducer": ReducerConfig(active=1, warmup=0, interval=1, rollouts=2, suppress_factor=0)},
    ],
)
def test_values_at_the_limits_are_accepted(options):
    assert EffiLoRAConfig(**options).heads >= 1


def test_targets_given_as_a_list_become_a_tuple_so_that_equal_configurations_compare_equal():
    assert EffiLoRAConfig(target_modules=["to_q", "to_v"]) == EffiLoRAConfig(target_modules=("to_q", "to_v"))


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 8}, 2.0),
        ({"rank": 16, "alpha": 8}, 0.5),
        ({"rank": 16, "alpha": 8, "scaling": "rslora"}, 2.0),
        ({"rank": 9, "scaling": "rslora"}, 3.0),
        ({"rank": 2, "alpha": 1, "scaling": "rslora"}, 1 / math.sqrt(2)),
    ],
)
def test_scale_is_alpha_over_rank_or_over_its_root(options, scale):
    assert EffiLoRAConfig(**options).scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("config", [EffiLoRAConfig(), full_config()], ids=["defaults", "everything set"])
def test_json_round_trip_is_exact(config):
    assert EffiLoRAConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["format_version"] == 1


def test_options_absent_from_the_json_take_their_defaults():
    assert EffiLoRAConfig.from_json('{"format_version": 1, "rank": 2}') == EffiLoRAConfig(rank=2)


@pytest.mark.parametrize("where", ["top", "reducer"])
def test_an_unknown_key_is_refused_not_ignored(where):
    data = EffiLoRAConfig().to_dict()
    (data if where == "top" else data["reducer"])["future_option"] = 1
    with pytest.raises(EffiLoRAError, match=r"unknown keys.*future_option"):
        EffiLoRAConfig.from_dict(data)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(version):
    with pytest.raises(EffiLoRAError, match="format version"):
        EffiLoRAConfig.from_dict({**EffiLoRAConfig().to_dict(), "format_version": version})


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_a_configuration_that_is_no_object_is_refused(data):
    with pytest.raises(EffiLoRAError, match="JSON object"):
        EffiLoRAConfig.from_dict(data)


def test_text_that_is_no_json_is_refused():
    with pytest.raises(EffiLoRAError, match="not JSON"):
        EffiLoRAConfig.from_json("{rank: 4}")


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": "0.1"},
        {"alpha": "4"},
        {"alpha": 10**400},
        {"target_modules": 5},
        {"reducer": {"active": "half"}},
        {"reducer": {"step_size": [1]}},
        {"reducer": None},
    ],
)
def test_json_values_of_the_wrong_type_are_refused_in_words(changes):
    with pytest.raises(EffiLoRAError):
        EffiLoRAConfig.from_dict({**EffiLoRAConfig().to_dict(), **changes})


def test_reading_a_dictionary_leaves_it_as_it_was():
    data = full_config().to_dict()
    EffiLoRAConfig.from_dict(data)
    assert data == full_config().to_dict()


@pytest.mark.parametrize(
    ("heads", "routing", "words"),
    [(1, "token", "1 head"), (1, "concept", "1 head, concept routing"), (3, "static", "3 heads, static routing")],
)
def test_heads_in_words(heads, routing, words):
    assert heads_text(heads, routing) == words
