"""What counts as a credential; that it is masked in texts and trees, and refused where it comes in.

The runs that must not write any are in test_security.py.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlm_lite import config, redact, storage
from openlm_lite.data.plan import PrepareConfig
from openlm_lite.data.prepare import prepare
from openlm_lite.errors import InputError
from openlm_lite.redact import credential_in, is_secret_name, redacted, redacted_tree
from openlm_lite.run import RunConfig

SECRET_NAMES = """
    key token secret password sig api_key apiKey APIKEY HF_TOKEN AWS_SECRET_ACCESS_KEY
    AWS_SESSION_TOKEN WANDB_API_KEY AWS_ACCESS_KEY_ID AWSAccessKeyId X-Amz-Signature
    X-Amz-Credential X-Amz-Security-Token X-Goog-Signature X-Goog-Credential PGPASSWORD MYSQL_PWD
    GITHUB_PAT client_secret credentials storage.api_keys SlackBotToken Authorization access-token
"""
PLAIN_NAMES = """
    tokenizer global_batch_tokens max_tokens total_tokens tokens_per_second flops_per_token token_id
    eos_token bos_token_id pad_token num_key_value_heads n_kv_heads qk_norm keyword monkey design
    prefix PWD OLDPWD TOKENIZERS_PARALLELISM HF_TOKEN_PATH AWS_SHARED_CREDENTIALS_FILE token_type
    sort_key keys path public_key assignment
"""
CREDENTIALS = [
    "https://me:canary@host/x",
    "https://canary@host/x",
    "https://me:can@canary@host/x",
    "s3://AKIA:can/canary+x@bucket/x",
    "https://h/x?X-Amz-Date=1&X-Amz-Signature=canary",
    "https://h/x?X-Amz-Credential=canary%2Fx&a=b",
    "https://h/x?X-Amz-Security-Token=canary",
    "https://h/x?GoogleAccessId=a&Expires=1&Signature=canary",
    "https://h/x?X-Goog-Algorithm=a&X-Goog-Signature=canary",
    "https://h/x?sv=2024&sr=b&sig=canary%3D&se=1",
    "https://h/x?X-Amz-%53ignature=canary",
    "https://h/x#access_token=canary",
]
TEXTS = [
    *CREDENTIALS,
    "GET https://h/a?sig=canary HTTP/1.1 failed",
    '{"key": "AKIA", "secret": "canary", "n": 1}',
    json.dumps({"inside": json.dumps({"password": "canary"})}),
    "{'aws_secret_access_key': 'canary', 'max_tokens': 3}",
    "S3FileSystem(token=canary, anon=False)",
    "client_secret: canary",
    "password=b'canary'",
    "os.environ['HF_TOKEN'] = 'canary'",
    "{'Authorization': 'AWS4-HMAC-SHA256 Credential=canary/x, Signature=canary'}",
    "Authorization: Basic canary\r\nHost: h",
    "Cookie: a=canary; b=canary",
    "HTTP 401 for 'Bearer canary0123456789abcdef'",
    "the token hf_canary" + "A" * 30 + " is invalid",
    "-----BEGIN RSA PRIVATE KEY-----\ncanary\n-----END RSA PRIVATE KEY-----",
]
HARMLESS = [
    "https://host:8443/a@b/c?prefix=x&list-type=2&design=3&keyword=x",
    "hf://datasets/org/name@main/x.jsonl",
    "s3://bucket/tokens/lang=de/x.parquet",
    "recipes/x.yaml: optim.lerning_rate: no such field; did you mean optim.lr?",
    "step  4/12  tokens 1.02k  loss 5.6  lr 5.00e-03  grad_norm 1.00  3.1k tokens/s",
    "{'eos_token': '</s>', 'num_key_value_heads': 8, 'flops_per_token': 123456789}",
    "model.init_from.tokenizer = bpe-300, vocab_size = 300",
    "KeyError: 'missing'",
    "unknown key: lr; token: 5",
    "token=None password=False",
    "Weights only load failed. WeightsUnpickler error: Unsupported global: GLOBAL posix.mkdir",
]
VALUE = "canary/with+odd\"'chars%\\and=more"


def test_names_are_told_apart_by_their_words() -> None:
    assert [name for name in SECRET_NAMES.split() if not is_secret_name(name)] == []
    assert [name for name in PLAIN_NAMES.split() if is_secret_name(name)] == []


def test_no_field_of_a_run_and_no_setting_of_prepare_looks_secret() -> None:
    """So that telemetry keeps all of a config."""
    import dataclasses

    names = [f.name for f in dataclasses.fields(PrepareConfig)]
    names += [path.rsplit(".", 1)[-1] for path in config._all_paths(RunConfig)]
    assert [name for name in names if is_secret_name(name)] == []


@pytest.mark.parametrize("text", TEXTS)
def test_credentials_in_a_text_are_masked_and_the_rest_stays(text: str) -> None:
    masked = redacted(text)
    assert "canary" not in masked and redact.MASK in masked
    assert redacted(masked) == masked


@pytest.mark.parametrize("text", HARMLESS)
def test_a_text_without_credentials_stays_as_it_is(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("spelling", ["plain", "url", "url path", "json", "python"])
def test_the_value_of_a_secret_variable_is_masked_wherever_it_stands(
    spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib.parse import quote

    monkeypatch.setenv("WANDB_API_KEY", VALUE)
    monkeypatch.setenv("MY_TOKENIZER", "no-canary-at-all")
    spelt = {
        "plain": VALUE,
        "url": quote(VALUE, safe=""),
        "url path": quote(VALUE),
        "json": json.dumps({"x": VALUE}),
        "python": repr([VALUE]),
    }[spelling]
    masked = redacted(f"no-canary-at-all in /data/{spelt}/x")
    assert "odd" not in masked and "more" not in masked
    assert "no-canary-at-all in /data/" in masked and masked.endswith("/x")
    assert credential_in(f"/data/{spelt}/x") == (
        "the value of the environment variable WANDB_API_KEY"
    )


def test_each_line_of_a_secret_variable_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_KEY", "-----BEGIN\ncanary line one\ncanary line two\n-----END")
    assert redacted("has canary line two in it") == f"has {redact.MASK} in it"


def test_short_values_and_paths_are_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    assert redacted(f"testing {tmp_path}") == f"testing {tmp_path}"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "/begins/with/a/slash")
    assert "slash" not in redacted("/begins/with/a/slash")


@given(st.text(st.characters(codec="utf-8"), min_size=8), st.text(), st.text())
def test_no_value_of_a_secret_variable_is_ever_left(value: str, before: str, after: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if "\0" in value:
            return
        patch.setenv("MY_SECRET", value)
        for line in value.splitlines():
            if len(line.strip()) >= 8 and not line.strip().startswith("-----"):
                assert line.strip() not in redacted(before + value + after).replace(redact.MASK, "")


def test_a_tree_is_masked_by_its_names_and_texts() -> None:
    tree = {
        "lr": 0.1,
        "max_tokens": 5,
        "eos_token": "</s>",
        "api_key": "canary",
        "pin": {"password": 12345678, "credentials": {"user": "canary", "empty": None, "on": True}},
        "runs": [{"url": "https://me:canary@h/x"}, ("a", 1)],
    }
    assert redacted_tree(tree) == {
        "lr": 0.1,
        "max_tokens": 5,
        "eos_token": "</s>",
        "api_key": "***",
        "pin": {"password": "***", "credentials": {"user": "***", "empty": None, "on": True}},
        "runs": [{"url": "https://***@h/x"}, ["a", 1]],
    }
    assert tree["api_key"] == "canary"


# --- where text goes out -------------------------------------------------------------------------


def test_a_log_line_is_masked_with_its_arguments_and_traceback_and_the_record_is_not() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(redact.Formatter("%(levelname)s %(message)s"))
    record_of: list[logging.LogRecord] = []
    handler.addFilter(lambda record: record_of.append(record) is None)
    logger = logging.Logger("alone")
    logger.addHandler(handler)
    try:
        raise ValueError("https://me:canary@host/x")
    except ValueError:
        logger.exception("reading %s", "https://h/x?sig=canary")
    assert "canary" not in stream.getvalue()
    assert "ERROR reading https://h/x?sig=***" in stream.getvalue()
    assert "ValueError: https://***@host/x" in stream.getvalue()
    assert record_of[0].args == ("https://h/x?sig=canary",)  # other handlers see what was said


def test_standard_error_is_masked_and_standard_output_keeps_its_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-canary")
    before = sys.stdout, sys.stderr
    with redact.guarded_output(), redact.guarded_output():
        print("password=hunter2 canary-canary")
        print("password=hunter2 canary-canary", file=sys.stderr)
        sys.stderr.writelines(["sig=a1b2c3\n"])
        assert sys.stderr.encoding == before[1].encoding and not sys.stderr.isatty()
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert out == "password=hunter2 ***\n"
    assert err == "password=*** ***\nsig=***\n"


# --- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", CREDENTIALS)
def test_a_url_with_a_credential_is_refused_at_every_gate_without_repeating_it(text: str) -> None:
    def decoded() -> Any:
        tree = config.override_tree([f"data.train='{text}'"])
        return config.decode(RunConfig, tree)

    def prepared() -> Any:
        return prepare(PrepareConfig(inputs=(text,), out="nowhere", train_tokenizer=300))

    for gate in (lambda: storage.is_remote(text), decoded, prepared):
        with pytest.raises(InputError, match="credentials in it is refused") as caught:
            gate()
        assert "canary" not in str(caught.value)
    with pytest.raises(InputError, match=r"command line: data\.train: "):
        decoded()


@pytest.mark.parametrize("text", HARMLESS)
def test_what_holds_no_credential_passes_the_gate(text: str) -> None:
    assert credential_in(text) is None


def test_the_value_of_a_secret_variable_in_a_setting_is_refused_by_the_variables_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", VALUE)
    with pytest.raises(InputError, match="variable WANDB_API_KEY") as caught:
        redact.refuse_credentials(f"/data/{VALUE}/x", "recipe.yaml: data.train")
    assert "canary" not in str(caught.value)
    assert str(caught.value).startswith("recipe.yaml: data.train: /data/***/x: ")
