"""No secret in a file that a run writes."""

from __future__ import annotations

import pytest

from megabridge.config.redaction import carry, is_secret, redacted


@pytest.mark.parametrize(
    "key", ["api_key", "token", "hf_token", "password", "client_secret", "aws_access_key_id", "secrets", "key"]
)
def test_names_of_secrets(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize(
    "key", ["tokenizer", "max_tokens", "num_key_value_heads", "eos_token", "logits_tokens", "keys_path", "monkey"]
)
def test_names_that_only_look_so(key: str) -> None:
    assert not is_secret(key)


def test_values_from_the_environment_stay_interpolations() -> None:
    raw = {"a": "${oc.env:HOST}", "b": "x ${a} y", "c": ["${oc.env:HOST,fallback-secret}"], "d": 3, "e": {"token": "literal"}}
    resolved = {"a": "gpu-host-7", "b": "x gpu-host-7 y", "c": ["fallback-secret"], "d": 3, "e": {"token": "literal"}}
    assert redacted(raw, resolved, {"HOST": "gpu-host-7"}) == {
        "a": "${oc.env:HOST}",
        "b": "x <redacted> y",
        "c": ["<redacted>"],
        "d": 3,
        "e": {"token": "<redacted>"},
    }


def test_everything_under_a_secret_name_goes() -> None:
    assert redacted({}, {"credentials": {"user": "me", "list": ["x"], "port": 1}}, {}) == {
        "credentials": {"user": "<redacted>", "list": ["<redacted>"], "port": 1}
    }


def test_the_command_line_is_carried_past_hydra() -> None:
    environ: dict[str, str] = {}
    arguments = carry(["--cfg", "job", "+logger.w.api_key='a b'", "seed=1", "x.token=${oc.env:Y}", "model.tokenizer=z"], environ)
    assert arguments[2] == "+logger.w.api_key=${oc.env:MEGABRIDGE_SECRET_LOGGER_W_API_KEY}"
    assert environ == {"MEGABRIDGE_SECRET_LOGGER_W_API_KEY": "a b"}
    assert arguments[3:] == ["seed=1", "x.token=${oc.env:Y}", "model.tokenizer=z"]
