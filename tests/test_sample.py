import io
import re
from pathlib import Path

import pytest
from texts import make_text

import humptygpt
import sample
import score
from humptygpt.cli import UserError
from humptygpt.formats import checkpoint
from humptygpt.generation import sampling
from humptygpt.generation.sampling import encode_prompt, read_prompts
from humptygpt.scoring.text import score_text
from humptygpt.tokenizers.basic import END_OF_TEXT, ByteTokenizer
from humptygpt.tokenizers.chat import ChatTokenizer


def printed(capsys, *argv: str) -> tuple[str, str]:
    """(stdout, stderr) of sample.py on this run."""
    capsys.readouterr()
    sample.main(["--out_dir=out/run", "--device=cpu", "--max_new_tokens=40", *argv])
    return capsys.readouterr()


def text_of(capsys, *argv: str) -> str:
    return printed(capsys, *argv)[0]


def test_only_text_goes_to_stdout(run_dir, capsys):
    out, err = printed(capsys, "--num_samples=2", "--max_new_tokens=20", "--start=A")
    assert out.count("A") >= 2 and len(out) == 2 * (1 + 20 + 1)  # prompt, tokens, line end
    assert "---------------" in err and "best val loss" in err


def test_the_same_seed_gives_the_same_text(run_dir, capsys):
    first = text_of(capsys, "--seed=1")
    assert first == text_of(capsys, "--seed=1") != text_of(capsys, "--seed=2")


def test_texts_may_come_from_a_file_or_standard_input(run_dir, capsys, monkeypatch):
    def text_from(key: str, source: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("Ak Ak"))
        return text_of(capsys, f"--{key}={source}")

    Path("text.txt").write_text("Ak Ak")
    expected = text_of(capsys, "--start=Ak Ak")
    assert text_from("start", "FILE:text.txt") == text_from("start", "-") == expected
    assert text_from("prompts", "text.txt") == text_from("prompts", "-") == expected


def test_a_checkpoint_may_be_named_itself(run_dir, capsys):
    zero_embeddings(run_dir / "best.pt")
    for name, which in (("best.pt", "best"), ("ckpt.pt", "latest")):
        text = text_of(capsys, f"--checkpoint={which}")
        assert text_of(capsys, f"--out_dir=out/run/{name}") == text


def zero_embeddings(path: Path) -> None:
    """All tokens become equally probable."""
    saved = checkpoint.read(path)
    saved["model"]["wte.weight"].zero_()
    saved["model"]["lm_head.weight"].zero_()
    checkpoint.save(path, saved)


def test_the_best_checkpoint_is_sampled_unless_the_latest_is_asked_for(run_dir, capsys):
    zero_embeddings(run_dir / "best.pt")
    assert text_of(capsys) != text_of(capsys, "--checkpoint=latest")
    (run_dir / "best.pt").unlink()
    assert text_of(capsys) == text_of(capsys, "--checkpoint=latest")
    note, loaded, *_ = printed(capsys)[1].splitlines()
    assert note == "note: there is no best.pt yet; using out/run/ckpt.pt"
    assert loaded.startswith("out/run/ckpt.pt: iter 6, best val loss ")


BAD = {
    "character 'é' (U+00E9) is not among the": ["--start=é"],
    "characters of this tokenizer; leave it out": ["--start=é"],
    "cannot read latin1.txt: it is not valid UTF-8": ["--start=FILE:latin1.txt"],
    "cannot read promts.txt: No such file or directory": ["--prompts=promts.txt"],
    "cannot read : Is a directory": ["--start=FILE:"],
    "prompt 2: character 'é' (U+00E9) is not among the": ["--prompts=prompts.txt"],
    "prompt 1: the prompt is empty; give at": ["--prompts=empty.txt"],
    "prompts cannot be combined with start": ["--start=A", "--prompts=prompts.txt"],
    "top_p=1.5 must be at most 1": ["--top_p=1.5"],
}


def test_bad_input_is_one_line(run_dir, fails, monkeypatch):
    loaded = sample.load("out/run", device="cpu")
    # it prints nothing
    monkeypatch.setattr(sample.SampleConfig, "pipeline", lambda *args: loaded)
    Path("latin1.txt").write_bytes(b"caf\xe9")
    Path("empty.txt").write_text("")
    Path("prompts.txt").write_text("A\né\n", encoding="utf-8")
    for complaint, argv in BAD.items():
        assert complaint in fails(sample.main, "--out_dir=out/run", *argv)


def test_greedy_texts_are_all_the_same_so_one_is_printed(run_dir, capsys):
    _, notes = printed(capsys, "--temperature=0")
    assert "at temperature=0 all samples are the same" in notes and "-----" not in notes


# --------------------------------------------------------------------------------------
# Many prompts, stop texts, log-probabilities, scores, turns


def texts_of(capsys, *argv: str) -> list[str]:
    """Each text of a run with one-line texts: no line break is sampled, since it is a stop text."""
    return text_of(capsys, "--stop=\n", *argv).splitlines()


def test_a_sample_is_the_same_alone_and_beside_others_of_other_prompts(run_dir, capsys, monkeypatch):
    Path("prompts.txt").write_text("A\nAk Ak Ak\nk A\n")
    together = texts_of(capsys, "--prompts=prompts.txt", "--num_samples=2")
    assert len(together) == 6
    for i, prompt in enumerate(("A", "Ak Ak Ak", "k A")):
        for n in (1, 2):
            texts = texts_of(capsys, f"--start={prompt}", f"--num_samples={n}")
            assert together[2 * i : 2 * i + n] == texts
    # as many at once as fit, batch by batch
    monkeypatch.setattr(sampling, "AT_ONCE", 2)
    assert texts_of(capsys, "--prompts=prompts.txt", "--num_samples=2") == together


def test_how_many_texts_fit_depends_on_memory_and_size(run_dir, monkeypatch):
    loaded = sample.load("out/run", device="cpu")
    monkeypatch.setattr(sampling, "free_memory", lambda device: 1_000_000)
    within = 4 * (2 * 2 * 32 * 16 + 8 * loaded.model.config.vocab_size)  # block_size is 16
    for size in (16, 100):
        found = sampling.texts_at_once(loaded.model, loaded.device, size)
        assert found == 900_000 // (within + 16 * size)
    assert sampling.texts_at_once(loaded.model, loaded.device, 2) > found


def test_a_text_ends_before_a_stop_text_and_end_of_text(run_dir, capsys):
    argv = ["--start=A", "--num_samples=1"]
    whole = text_of(capsys, *argv)[:-1]
    stop = whole[10:13]
    found = text_of(capsys, *argv, f"--stop={stop}", "--stop=nowhere")[:-1]
    assert found == whole[: whole.index(stop, 1)]


def test_a_prompt_longer_than_the_context_is_read_from_its_end(run_dir, capsys):
    long = "Ak " * 10
    found, notes = printed(capsys, f"--start={long}")
    assert found.startswith(long)
    assert "note: prompt 1 has 30 tokens; only the last 16 are used" in notes


def test_weights_in_fewer_bits_sample_text_and_score_nearly_the_same(run_dir, capsys):
    Path("text.txt").write_text("Ak Ak Ak Ak " * 20)
    scores = []
    for low in ([], ["--dtype=bfloat16"], ["--quantize=int8"]):
        assert len(text_of(capsys, "--start=A", "--num_samples=1", *low)) > 20
        score.main(["--out_dir=out/run", "--text=text.txt", *low])
        scores.append(float(capsys.readouterr().out.split()[0]))
    assert scores == pytest.approx([scores[0]] * 3, rel=0.01)


def test_a_prompt_may_begin_with_end_of_text_if_that_is_the_name_of_the_models_token():
    tokenizer = ByteTokenizer(separated=True)
    text = f"{END_OF_TEXT}ab"
    assert encode_prompt(text, tokenizer) == [256, *b"ab"]
    chat = ChatTokenizer(tokenizer)  # its texts end with <|im_end|>
    assert encode_prompt(text, chat) == [*text.encode()]


def test_only_a_line_break_ends_a_prompt():
    Path("prompts.txt").write_text("a\x0cb\u2028c\x85\nd\n", encoding="utf-8")
    prompts = read_prompts(None, "prompts.txt", ByteTokenizer(), 99)
    assert [prompt.text for prompt in prompts] == ["a\x0cb\u2028c\x85", "d"]


def test_from_a_notebook_three_lines_are_enough(run_dir, capsys):
    loaded = sample.load("out/run", device="cpu")
    text = loaded.complete("A", max_new_tokens=40, temperature=0.9, seed=1)
    argv = ["--start=A", "--num_samples=1", "--temperature=0.9", "--seed=1"]
    assert text == text_of(capsys, *argv)[:-1]
    stopped = loaded.complete("A", max_new_tokens=40, stop=(text[5:8],), temperature=0.9, seed=1)
    assert text.startswith(stopped) and len(stopped) <= 5
    assert loaded.complete("A", max_new_tokens=40, stop=text[5:8], temperature=0.9, seed=1) == stopped
    for keys, complaint in (
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"temperature": -1}, "temperature=-1.0 must be at least 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be int"),
        ({"seed": 2**63}, r"seed=9223372036854775808 must be at least 0 and below 9.2"),
    ):
        with pytest.raises(UserError, match=re.escape(complaint)):
            loaded.complete("A", **keys)


def test_a_loaded_text_model_streams_and_has_the_log_probabilities_of_score_py(run_dir, capsys):
    loaded = sample.load(run_dir)
    keys = {"temperature": 0, "max_new_tokens": 20}
    assert "A" + "".join(loaded.stream("A", **keys)) == loaded.complete("A", **keys)
    text = make_text(300)
    found = loaded.logprobs(text)
    assert "".join(token for token, _ in found) == text[-len(found) :]
    total = score_text(loaded.model, loaded.tokenizer, text)["nats"]
    assert sum(nats for _, nats in found) == pytest.approx(-total, rel=1e-5)
    with pytest.raises(humptygpt.UserError, match="no token to predict"):
        loaded.logprobs("")
    with pytest.raises(humptygpt.UserError, match="does not talk"):
        loaded.reply([{"role": "user", "content": "A"}])
