from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openlm_lite.cli import main
from openlm_lite.data.tokenizer import Tokenizer
from openlm_lite.errors import InputError, RunError
from openlm_lite.eval.generate import Sampling, cached_steps, filtered_logits, generate
from openlm_lite.eval.model_scorer import HFScorer
from openlm_lite.eval.text import TextStream, generate_texts, read_prompts
from openlm_lite.hf.compare import load_hf, max_positions
from openlm_lite.hf.export import export_checkpoint
from openlm_lite.model.attention import KVCache
from openlm_lite.model.transformer import Transformer
from tests.tiny_run import TEXT, save_tiny_run, tiny_config, tiny_model, tiny_tokenizer

ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"norm": "rms_norm", "qk_norm": "none"},
    {"norm": "rms_norm", "qk_norm": "per_head", "tie_embeddings": True},
    {"qk_norm": "none", "norm_bias": True},
    {"qk_norm": "none", "norm_gain": False, "n_kv_heads": 4},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(tiny_config())


def greedy_without_cache(model: Transformer, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    with torch.inference_mode():
        for _ in range(count):
            logits_BTV = model(torch.tensor([tokens]))
            assert isinstance(logits_BTV, torch.Tensor)
            tokens.append(int(logits_BTV[0, -1].argmax()))
    return tokens[-count:]


# --- the same tokens on every way ----------------------------------------------------------------


@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_greedy_generation_equals_without_cache_and_transformers_token_for_token(
    changes: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model(tiny_config(**changes))
    prompt = tokenizer.encode(TEXT[:30]).tolist()
    [ours] = generate(model, [prompt], max_new_tokens=30)
    assert ours == greedy_without_cache(model, prompt, 30)
    run = save_tiny_run(tmp_path / "run", model, tokenizer)
    export_checkpoint(str(run), str(tmp_path / "hf"))
    native = load_hf(str(tmp_path / "hf"), torch.float32)
    tokens_BT = torch.tensor([prompt])
    theirs = native.generate(
        tokens_BT,
        attention_mask=torch.ones_like(tokens_BT),
        do_sample=False,
        min_new_tokens=30,
        max_new_tokens=30,
        eos_token_id=None,
    )
    assert ours == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("split", [1, 5, 19])
def test_a_prompt_may_be_given_to_the_cache_in_parts(model: Transformer, split: int) -> None:
    tokens = list(range(1, 21))

    def last(cache: KVCache, part: list[int]) -> torch.Tensor:
        at = torch.tensor([len(part) - 1])
        logits_nV = model(torch.tensor([part]), cache=cache, logits_at=at)
        assert isinstance(logits_nV, torch.Tensor)
        return logits_nV

    with torch.inference_mode():
        whole = cached_steps(model, 1)([tokens])
        cache = KVCache(model.cfg, 1, 20, torch.device("cpu"), torch.float32)
        last(cache, tokens[:split])
        parts = last(cache, tokens[split:])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_a_seed_decides_the_samples(model: Transformer) -> None:
    def draw(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return generate(model, [[1, 2, 3]], max_new_tokens=40, sampling=sampling)[0]

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(5)}) == 5


def test_generation_ends_at_the_end_of_text_which_is_not_part_of_it(model: Transformer) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    [free] = generate(model, [[1, 2, 3]], max_new_tokens=20, sampling=sampling)
    eot = free[7]
    [stopped] = generate(model, [[1, 2, 3]], max_new_tokens=20, sampling=sampling, eot_id=eot)
    assert stopped == free[: free.index(eot)]


# --- the sampler ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=12, unique=True),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.3]),
)
@example([0.0, 0.5, 1.4e-45], 2.0, 0, 0.5, 0.5)  # the last underflows to the first
def test_the_filters_are_those_of_transformers(
    logits: list[float], temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    seen = [0, 1, 0]
    chain = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    logits_V = torch.tensor(logits)
    # equal logits may be taken in another order than ours, and top_p sums probabilities in another:
    # a tie, among logits or with the limit, may fall either way
    theirs = LogitsProcessorList(chain)(torch.tensor([seen]), logits_V[None].clone())[0]  # pyright: ignore
    ours = filtered_logits(logits_V, seen, Sampling(penalty, temperature, top_k, top_p))
    if torch.equal(ours.isinf(), theirs.isinf()):
        torch.testing.assert_close(ours, theirs)
    elif not torch.equal(ours.sort().values, theirs.sort().values):
        order = theirs.softmax(0).sort(descending=True).values
        assert order.cumsum(0).sub(top_p).abs().min() < 1e-5
    assert ours.isfinite().any()


def test_greedy_takes_the_repetition_penalty_into_account() -> None:
    logits_V = torch.tensor([2.0, 1.5, -1.0])
    assert filtered_logits(logits_V, [0, 2], Sampling(2.0)).tolist() == [1.0, 1.5, -2.0]
    assert logits_V.tolist() == [2.0, 1.5, -1.0]  # the caller's logits stay


def test_impossible_sampling_is_refused_all_at_once() -> None:
    with pytest.raises(InputError) as refused:
        Sampling(repetition_penalty=0, temperature=-1, top_k=-1, top_p=0, seed=-1)
    for name in ("repetition_penalty = 0", "temperature = -1", "top_k", "top_p = 0", "seed"):
        assert name in str(refused.value)
    for temperature in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="temperature"):
            Sampling(temperature=temperature)


# --- text ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), tail=st.binary(max_size=6))
def test_streamed_pieces_are_whole_characters_and_add_up(text: str, tail: bytes) -> None:
    tokenizer = BYTES
    ids = tokenizer.encode(text).tolist()
    ids += [BYTE_IDS[b] for b in tail]
    stream = TextStream(tokenizer)
    pieces = [stream.feed(i) for i in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    if not tail and "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


BYTES = tiny_tokenizer()
BYTE_IDS = [
    int(i)
    for b in range(256)
    for i in range(1, 257)
    if BYTES.coder.bpe.ranks[bytes([b])] == i  # pyright: ignore[reportAttributeAccessIssue]
]


def test_text_streams_before_the_last_token_is_there(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(TEXT).tolist()
    assert [stream.feed(i) for i in ids[:3]] == [tokenizer.decode([i]) for i in ids[:3]]


@given(
    text=st.text("abc", max_size=20),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_a_text_ends_before_the_stop_string_that_is_complete_first(
    text: str, stop: list[str]
) -> None:
    stream, shown = TextStream(BYTES, stop), ""
    for n, i in enumerate(BYTES.encode(text).tolist()):
        shown += stream.feed(i)
        assert text.startswith(shown)
        seen = BYTES.decode(BYTES.encode(text).tolist()[: n + 1])
        assert stream.stopped == any(s in seen for s in stop)
        if stream.stopped:
            assert shown == seen[: min(seen.find(s) for s in stop if s in seen)]
            assert stream.finish() == "" and stream.feed(1) == ""
            return
    assert shown + stream.finish() == text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Transformer, tokenizer: Tokenizer) -> Path:
    return save_tiny_run(tmp_path_factory.mktemp("text") / "run", model, tokenizer)


@pytest.fixture(scope="module")
def hf(run: Path) -> Path:
    export_checkpoint(str(run), str(run.parent / "hf"))
    return run.parent / "hf"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, 0.8, 20, 0.9, seed=5)])
def test_a_run_and_its_export_write_the_same_text(
    run: Path, model: Transformer, tokenizer: Tokenizer, hf: Path, sampling: Sampling
) -> None:
    for prompt in ("A small", ""):
        texts = {
            texts_of(str(path), [prompt], max_new_tokens=20, sampling=sampling)[0]
            for path in (run, run / "checkpoints", hf)
        }
        ids = tokenizer.encode(prompt).tolist() or [tokenizer.eot_id]
        [expected] = generate(
            model, [ids], max_new_tokens=20, sampling=sampling, eot_id=tokenizer.eot_id
        )
        assert texts == {tokenizer.decode(expected)}


# --- batches -------------------------------------------------------------------------------------


def texts_of(path: str, prompts: list[str], **how: Any) -> list[str]:
    texts = [""] * len(prompts)
    for number, text, _ in generate_texts(path, prompts, **how):
        texts[number] += text
    return texts


PROMPTS = ["A small tokenizer, for", "A", "", "it was trained on a small text, again", "small"]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, 0.8, 20, 0.9, seed=5)])
def test_a_prompt_in_a_batch_gets_the_text_that_it_gets_alone(
    run: Path, hf: Path, sampling: Sampling
) -> None:
    alone = []
    for i, prompt in enumerate(PROMPTS):
        own = replace(sampling, seed=sampling.seed + i)
        alone += texts_of(str(run), [prompt], max_new_tokens=20, sampling=own)
    how: dict[str, Any] = {"max_new_tokens": 20, "sampling": sampling}
    for path, batch_size in ((run, 2), (hf, 5)):
        assert texts_of(str(path), PROMPTS, batch_size=batch_size, **how) == alone


@settings(max_examples=15)
@given(
    prompts=st.lists(st.lists(st.integers(0, 319), min_size=1, max_size=12), min_size=1, max_size=4)
)
def test_rows_of_unequal_length_are_continued_as_each_alone(prompts: list[list[int]]) -> None:
    model = tiny_model(tiny_config(positions="alibi", qk_norm="none"))
    together = generate(model, prompts, max_new_tokens=6)
    assert together == [generate(model, [one], max_new_tokens=6)[0] for one in prompts]


@pytest.mark.parametrize("kind", ["mpt", "bloom"])
def test_classes_that_state_their_length_otherwise_or_not_at_all_are_continued(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """MPT has a max_seq_len, BLOOM none: it takes prompts of any length."""
    from transformers import BloomConfig, BloomForCausalLM, MptConfig, MptForCausalLM

    torch.manual_seed(0)
    made: Any
    if kind == "mpt":
        made = MptForCausalLM(
            MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=48, vocab_size=320)
        )
    else:
        made = BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=16, n_layer=1, n_head=2))
    made.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    loaded = load_hf(str(tmp_path), torch.float32)
    scorer = HFScorer(loaded)
    assert scorer.max_seq_len == max_positions(loaded.config) == (48 if kind == "mpt" else 1 << 30)
    prompts = ["A small tokenizer, for", "A"]
    together = texts_of(str(tmp_path), prompts, max_new_tokens=8)
    for prompt, text in zip(prompts, together, strict=True):
        ids = tokenizer.encode(prompt).tolist()
        [new] = scorer.generate([ids], 8, tokenizer.eot_id, lambda tokens: False)
        assert new is not None and text == tokenizer.decode(new)
    if kind == "mpt":
        with pytest.raises(InputError, match="max_seq_len = 48"):
            texts_of(str(tmp_path), [TEXT * 2], max_new_tokens=8)
    else:
        assert texts_of(str(tmp_path), [TEXT * 2], max_new_tokens=2) != [""]


def test_stop_strings_cut_the_text_where_transformers_stops(run: Path, hf: Path) -> None:
    from transformers import AutoTokenizer

    [free] = texts_of(str(run), ["A small"], max_new_tokens=30)
    stop = free[9:12]
    pieces = list(generate_texts(str(run), ["A small"], max_new_tokens=30, stop=[stop, "never"]))
    assert pieces[-1].ended == "stop string"
    ours = "".join(piece.text for piece in pieces)
    assert ours == free[: free.index(stop)]
    words = AutoTokenizer.from_pretrained(hf)
    ids = words("A small", return_tensors="pt")
    theirs = load_hf(str(hf), torch.float32).generate(
        **ids, max_new_tokens=30, do_sample=False, stop_strings=[stop], tokenizer=words
    )
    text = words.decode(theirs[0, ids["input_ids"].shape[1] :])
    assert text.startswith(ours + stop)


def test_the_command_streams_one_prompt_and_numbers_many(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = texts_of(str(run), PROMPTS[:2], max_new_tokens=9)
    greedy = ["--max-new-tokens", "9", "--temperature", "0"]
    assert main(["generate", str(run), PROMPTS[0], *greedy]) == 0
    assert capsys.readouterr().out == PROMPTS[0] + alone[0] + "\n"
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS[0] + "\n\n" + PROMPTS[1] + "\n")
    assert main(["generate", str(run), "--prompts-file", str(file), *greedy]) == 0
    shown = capsys.readouterr().out
    assert shown.index(f"--- 0 (length)\n{PROMPTS[0]}{alone[0]}\n") == 0
    assert f"--- 1 (length)\n{PROMPTS[1]}{alone[1]}\n" in shown
    assert main(["generate", str(run), PROMPTS[0], PROMPTS[1], *greedy, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["generations"]
    assert [one["text"] for one in found] == alone


# --- bad input -----------------------------------------------------------------------------------


def test_lengths_that_do_not_fit_are_refused(model: Transformer) -> None:
    for prompt, count, message in (
        ([], 5, "no tokens"),
        ([1] * 64, 1, "at most 63"),
        ([1] * 60, 5, "at most 4 new tokens"),
        ([1], 0, "at least 1"),
        ([1, 320], 5, "knows 0 to 319"),
        ([-1], 5, "knows 0 to 319"),
    ):
        with pytest.raises(InputError, match=message):
            generate(model, [[1, 2], prompt], max_new_tokens=count)
    assert len(generate(model, [[1] * 60], max_new_tokens=4)[0]) == 4


def test_generating_text_checks_everything_before_the_first_piece(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="found nothing"):
        generate_texts(str(tmp_path / "none"), ["A"])
    with pytest.raises(InputError, match="max_seq_len = 64"):
        generate_texts(str(run), [TEXT * 10])
    with pytest.raises(InputError, match="device = 'abacus'"):
        generate_texts(str(run), ["A"], device="abacus")
    with pytest.raises(InputError, match=r"prompt 1, 'A small.*at most 63"):
        generate_texts(str(run), ["A", TEXT * 10], max_new_tokens=5)
    for how, message in (
        ({"stop": [""]}, "a stop string is empty"),
        ({"batch_size": 0}, "batch_size = 0"),
    ):
        with pytest.raises(InputError, match=message):
            generate_texts(str(run), ["A"], max_new_tokens=5, **how)
    with pytest.raises(InputError, match="no prompts"):
        generate_texts(str(run), [])
    bare = tmp_path / "bare" / "checkpoints"
    shutil.copytree(run / "checkpoints", bare)
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        generate_texts(str(bare), ["A"], max_new_tokens=5)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        generate_texts(str(broken), ["A"], max_new_tokens=5)


def test_an_exported_folder_with_foreign_code_is_not_run(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "code.C", '
        '"AutoModelForCausalLM": "code.M"}}'
    )
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')\n")
    with pytest.raises(InputError, match="transformers cannot load"):
        generate_texts(str(tmp_path), ["A"], max_new_tokens=5)


def test_a_file_of_prompts_says_which_line_is_none(tmp_path: Path) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "A\\nsmall"}\n\n{"prompt": "", "id": 3}\n')
    assert read_prompts(str(good)) == ["A\nsmall", ""]
    bad = tmp_path / "bad.jsonl"
    for line in ('{"text": "A"}', "A small", '{"prompt": 3}', "[" * 99):
        bad.write_text('{"prompt": "A"}\n' + line + "\n")
        with pytest.raises(InputError, match=r"bad\.jsonl:2: is no object"):
            read_prompts(str(bad))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(str(tmp_path / "empty.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(str(tmp_path / "bytes.txt"))


def test_logits_that_are_not_finite_give_no_text(model: Transformer) -> None:
    broken = tiny_model(tiny_config())
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))  # pyright: ignore
    with pytest.raises(RunError, match="behind token 2 are not finite"):
        generate(broken, [[1, 2]], max_new_tokens=3)
