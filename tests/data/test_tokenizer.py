"""Tokenizers: text comes back, cutting and threads change nothing, mistakes are sentences."""

import random

import numpy as np
import pytest

from mixtral_jax.config import DataConfig, SourceConfig, UserError
from mixtral_jax.data import tokenizer as tokenizer_module
from mixtral_jax.data import tokenizer_training
from mixtral_jax.data.chat_template import ChatTemplate
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    lines = [
        "def f(x):\n    return x + 12345\n",
        "\tindented by a tab\n\n",
        "Größe, Ärger und Öl 😀\n",
        "the end of it\n",
    ]
    (directory / "a.txt").write_text("".join(random.Random(0).choices(lines, k=400)))
    sources = [SourceConfig(name="a", path=str(directory / "a.txt"))]
    data = DataConfig(sources=sources, tokenizer="train", cache_dir=str(directory / "cache"))
    return load_tokenizer(data, 300), data


@pytest.fixture(params=["mixtral", "mixtral-v3", "train"])
def tokenizer(request, trained):
    return trained[0] if request.param == "train" else load_tokenizer(DataConfig(tokenizer=request.param), 32768)


KINDS = [" ", "  ", "\n", "\r\n", "\t", "\0", "\x7f", "a", "Z", "9", "é", "e\u0301", "ﬁ", "中", "😀", "👩\u200d👧",
         "</s>", "<s>", "[INST]", "<0x41>", "<unk>", "\u2028", "\ufeff"]  # fmt: skip


def random_text(rng, length):
    def character():
        code = rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
        return rng.choice(KINDS) if rng.random() < 0.8 else chr(code)

    return "".join(character() for _ in range(length)).replace("\u2581", "")


def test_any_text_comes_back_and_its_bytes_are_counted(tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        text = random_text(rng, rng.randrange(40))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        prefix = 1 if text else 0  # the space before every text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + prefix


def test_control_tokens_in_text_stay_text(tokenizer):
    ids = tokenizer.encode("<s> a </s> b [INST] <unk>")
    assert not set(ids) & {0, tokenizer.bos_id, tokenizer.eos_id}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert all(tokenizer.token_bytes[[1, 2]] == 0)


def test_cutting_long_texts_changes_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "CHUNK", 20)
    monkeypatch.setattr(tokenizer_module, "GROUP", 7)
    rng = random.Random(2)
    texts = [random_text(rng, rng.randrange(300)) for _ in range(100)] + ["a  b   c d " * 50, "", " ", "x y"]
    texts += [
        "".join(rng.choice(["the ", "def", " ", "\n    ", "größe ", "(x)"]) for _ in range(400)) for _ in range(50)
    ]
    cuts = [tokenizer_module._cut(text) for text in texts]
    assert sum(map(len, cuts)) > 3 * len(texts)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, np.array(tokenizer.encode(text), np.int32))


def test_a_model_whose_pieces_reach_over_spaces_is_never_cut(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello big world and so on"] * 50), model_prefix=str(tmp_path / "m"), vocab_size=326,
        model_type="bpe", byte_fallback=True, split_by_whitespace=False, minloglevel=2, pad_id=-1,
    )  # fmt: skip
    tokenizer = Tokenizer.from_file(tmp_path / "m.model")
    text = "hello big world and so on " * 2000
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)
    assert len(tokenizer.encode("hello big world")) == 2


def test_training_gives_exactly_the_vocabulary_once_and_the_same_each_time(trained, tmp_path, monkeypatch):
    tokenizer, data = trained
    assert tokenizer.vocab_size == 300
    again = load_tokenizer(DataConfig(sources=data.sources, tokenizer="train", cache_dir=str(tmp_path)), 300)
    assert again.fingerprint == tokenizer.fingerprint
    monkeypatch.setattr(tokenizer_training, "_train", lambda *args: pytest.fail("trained again"))
    assert load_tokenizer(data, 300).model_bytes == tokenizer.model_bytes


def test_a_trained_one_has_the_control_tokens_of_mixtral_s_third_where_it_is_to(trained):
    plain, data = trained
    released = load_tokenizer(DataConfig(tokenizer="mixtral-v3"), 32768)
    controlled = load_tokenizer(DataConfig(sources=data.sources, tokenizer="train-v3", cache_dir=data.cache_dir), 310)
    ids = [controlled.control_id(piece) for piece in tokenizer_training.V3_CONTROLS]
    assert ids == [released.control_id(piece) for piece in tokenizer_training.V3_CONTROLS] == list(range(3, 10))
    assert (ChatTemplate(controlled).version, ChatTemplate(plain).version) == ("v3", "v1")
    assert controlled.vocab_size == 310
    assert not set(controlled.encode("[INST] x [/INST]")) & set(ids)


def test_text_with_the_trainers_own_mark_is_learnt_from(tmp_path):
    (tmp_path / "a.txt").write_text("column\tcolumn\u2585column\n" * 100)
    data = DataConfig(
        sources=[SourceConfig(name="a", path=str(tmp_path / "a.txt"))], tokenizer="train", cache_dir=str(tmp_path)
    )
    assert len(load_tokenizer(data, 274).encode("column")) <= 2


def test_digits_are_single_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("2024 and 2024 " * 100)
    data = DataConfig(
        sources=[SourceConfig(name="a", path=str(tmp_path / "a.txt"))], tokenizer="train", cache_dir=str(tmp_path)
    )
    tokenizer = load_tokenizer(data, 272)
    assert len(tokenizer.encode("and")) == 1
    assert len(tokenizer.encode("2024")) == 5  # with the space before them


def test_a_mistake_in_the_sources_is_still_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{')
    sources = [SourceConfig(name="a", path=str(tmp_path / "a.jsonl"))]
    assert "a.jsonl, line 2 is not a JSON record" in complaint("train", 300, sources=sources, cache_dir=str(tmp_path))
    assert not list(tmp_path.glob("*.model"))


def test_the_sample_takes_the_same_from_every_file_and_stays_in_its_budget(tmp_path):
    for number, size in enumerate([10, 5000, 5000, 100]):
        (tmp_path / f"{number}.txt").write_text(str(number) * size)
    source = SourceConfig(name="a", path=str(tmp_path))
    sample = "".join(tokenizer_training._sample(source, 1000))
    counts = [sample.count(str(number)) for number in range(4)]
    assert counts[0] == 10
    assert counts[1] == 330  # a third of what the first left
    assert sum(counts[:3]) + counts[3] <= 1000
    assert counts[3] == 100


def test_saved_and_loaded_is_the_same(mixtral, tmp_path):
    mixtral.save(tmp_path / "tokenizer.model")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.model")
    assert (loaded.fingerprint, loaded.vocab_size) == (mixtral.fingerprint, 32000)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_the_bundled_vocabularies():
    assert load_tokenizer(DataConfig(tokenizer="mixtral"), 40000).vocab_size == 32000
    assert load_tokenizer(DataConfig(tokenizer="mixtral-v3"), 32768).vocab_size == 32768


def complaint(tokenizer, vocab_size, **kwargs):
    with pytest.raises(UserError) as caught:
        load_tokenizer(DataConfig(tokenizer=str(tokenizer), **kwargs), vocab_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused():
    assert complaint("mixtral", 4096) == (
        "data.tokenizer=mixtral has 32000 tokens but model.vocab_size is 4096: set model.vocab_size=32000 or choose a "
        "smaller tokenizer (data.tokenizer=train)"
    )


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\x00" * 100, bytes(1000)])
def test_what_is_no_model_is_refused(tmp_path, content, capfd):
    (tmp_path / "t.model").write_bytes(content)
    assert f"the tokenizer {tmp_path}/t.model is not a sentencepiece model" in complaint(tmp_path / "t.model", 4096)
    assert capfd.readouterr().err == ""


def test_a_missing_file_is_refused(tmp_path):
    assert "cannot read the tokenizer mistral: No such file" in complaint("mistral", 4096)
    assert "cannot read the tokenizer" in complaint(tmp_path, 4096)


def test_too_little_text_and_too_small_a_vocabulary_are_refused(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("hello world " * 20)
    kwargs = {"sources": [SourceConfig(name="a", path=str(tmp_path / "a.txt"))], "cache_dir": str(tmp_path / "c")}
    sentence = complaint("train", 4096, **kwargs)
    assert "the sources hold text for 2" in sentence
    limit = int(sentence.split("lower model.vocab_size to ")[1].split()[0])
    assert load_tokenizer(DataConfig(tokenizer="train", **kwargs), limit).vocab_size == limit
    sentence = complaint("train", 100, **kwargs)
    limit = int(sentence.split("at least ")[1])
    assert load_tokenizer(DataConfig(tokenizer="train", **kwargs), limit).vocab_size == limit
    assert "trainer" not in capfd.readouterr().err  # the library's own log
