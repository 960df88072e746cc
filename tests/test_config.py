"""Configurations travel through TOML unchanged, and a wrong one is named."""

import dataclasses

import pytest

from pf_core.config import Config, DataConfig, VAEConfig
from pf_core.errors import ConfigError


def test_a_config_survives_toml(tmp_path):
    config = Config(seed=7, data=DataConfig(holdout=("a=b,c=d",), covariates=("age",)), vae=VAEConfig(n_latent=11))
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert Config.from_toml(path) == config


def test_a_config_is_hashable_so_that_compiled_steps_can_key_on_it():
    assert hash(Config()) == hash(dataclasses.replace(Config()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[vae]\nn_laten = 3", r"unknown setting vae\.n_laten; did you mean n_latent"),
        ("[vae]\nn_latent = 'x'", r"vae\.n_latent is 'x'; a value of type int"),
        ("[vae]\nn_latent = true", r"vae\.n_latent is True"),
        ("[vae]\ninput = 'raw'", r"vae\.input is 'raw'; one of 'log1p', 'counts'"),
        ("vae = 3", "vae is 3; a table was wanted"),
        ("[data]\nholdout = 'x'", r"data\.holdout is 'x'; a list of strings"),
        ("[vae]\nn_latent = 0", r"vae\.n_latent is 0"),
        ("[data]\nvalidation_share = 1.0", r"data\.validation_share is 1\.0"),
        ("[stage_vae]\nlearning_rate = nan", r"stage_vae\.learning_rate is nan"),
        ("[stage_vae]\nmax_steps = -1", r"stage_vae\.max_steps is -1"),
        ("seed = -1", "seed is -1"),
        ("[flow]\nunbalanced = 2", r"flow\.unbalanced is 2, and an exact plan"),
        ("[flow]\nepsilon = 0\ncoupling = 'entropic'", r"flow\.epsilon is 0"),
        ("[flow]\nbins = -1", r"flow\.bins is -1"),
        ("[flow]\npace = 1.5", r"flow\.pace is 1\.5; a number from 0 to 1"),
        ("[flow]\nbend = -0.1", r"flow\.bend is -0\.1; a number from 0 to 1"),
        ("[flow]\nreach = nan", r"flow\.reach is nan; a number from 0 to 1"),
        ("seed =", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Config.from_toml(path)


def test_a_whole_number_is_taken_for_a_float(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[vae]\nbeta = 2")
    assert Config.from_toml(path).vae.beta == 2.0
