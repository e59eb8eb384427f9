"""Tokenizers with fewer tokens: the same splits where these are kept, any text as before decoded from fewer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from apt_trainer.errors import UserError
from apt_trainer.tasks.vocabulary import choose_tokens, count_tokens, cut_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs, he said quickly",
    "how vexingly quick daft zebras jump! over and over, quickest of them all",
    "les naïfs ægithales hâtifs pondant à Noël où il gèle sont sûrs d'être déçus",
    "1234567890 times 99 is more than 100, isn't it? unhappiness, happily unhappy",
] * 3
USED = CORPUS[:2]
UNSEEN = [*CORPUS[2:5], "Zażółć gęślą jaźń 😀 of the the", "x", " two  spaces\nand a line"]


def _byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _byte_fallback() -> Any:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    state = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(_only_special(state, special[:3]))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _only_special(state: str, names: list[str]) -> str:
    """Bytes are plain tokens of the model."""
    import json

    found = json.loads(state)
    found["added_tokens"] = [added for added in found["added_tokens"] if added["content"] in names]
    return json.dumps(found)


def _word_piece() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    return BertTokenizer(vocab=tokenizer.get_vocab())


def _unigram() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    numbers = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=numbers)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


ALL = [_byte_level, _byte_fallback, _word_piece, _unigram]


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("make", ALL)
def test_texts_whose_tokens_are_kept_are_split_as_before(make: Callable[[], Any]) -> None:
    tokenizer = make()
    before = _encoded(tokenizer, USED)
    kept = choose_tokens(tokenizer, count_tokens(before))
    assert len(kept) < len(tokenizer) and kept == sorted(kept)
    small = cut_tokenizer(tokenizer, kept)
    assert type(small) is type(tokenizer) and len(small) == len(kept)
    after = _encoded(small, USED)
    assert [[kept[number] for number in row] for row in after] == before
    names = small.convert_ids_to_tokens(range(len(small)))
    assert names == tokenizer.convert_ids_to_tokens(kept)
    assert small.special_tokens_map == tokenizer.special_tokens_map
    assert small.pad_token_id is None or kept[small.pad_token_id] == tokenizer.pad_token_id


@pytest.mark.parametrize("make", ALL)
def test_any_text_can_still_be_encoded(make: Callable[[], Any]) -> None:
    tokenizer = make()
    small = cut_tokenizer(tokenizer, choose_tokens(tokenizer, count_tokens(_encoded(tokenizer, USED))))
    for text in UNSEEN:
        old, new = (t.decode(t(text)["input_ids"], skip_special_tokens=True) for t in (tokenizer, small))
        assert new == old
        unknown = [t(text)["input_ids"].count(t.unk_token_id) for t in (tokenizer, small)]
        assert unknown[0] == unknown[1]


@pytest.mark.parametrize("make", ALL)
def test_a_number_leaves_the_most_frequent(make: Callable[[], Any]) -> None:
    tokenizer = make()
    counts = count_tokens(_encoded(tokenizer, CORPUS))
    least, all_used = len(choose_tokens(tokenizer, {})), len(choose_tokens(tokenizer, counts))
    size = (least + all_used) // 2
    kept = choose_tokens(tokenizer, counts, size)
    assert least < len(kept) <= size
    assert len(cut_tokenizer(tokenizer, kept)) == len(kept)
    with pytest.raises(UserError, match=rf"vocabulary={least - 1}: special tokens .* are {least:,} tokens"):
        choose_tokens(tokenizer, counts, least - 1)


def test_merges_on_the_way_to_a_token_stay() -> None:
    tokenizer = _byte_level()
    word = max(tokenizer.get_vocab(), key=len)
    number = tokenizer.convert_tokens_to_ids(word)
    kept = choose_tokens(tokenizer, {number: 1})
    small = cut_tokenizer(tokenizer, kept)
    text = tokenizer.decode([number])
    assert [kept[n] for n in small(text)["input_ids"]] == tokenizer(text)["input_ids"] == [number]


def test_what_cannot_be_cut_is_said() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="vocabulary: Slow is no fast tokenizer"):
        choose_tokens(Slow(), {})
