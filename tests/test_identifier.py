"""task=identifier on the pocket model and its tokenizer."""

import csv

import pytest

from dreambooth import UserError, compose
from dreambooth.identifier import around_the_rare_word, identifier, rare_words
from dreambooth.pocket.encoders import load_tokenizer


def test_candidates_are_short_rare_and_one_token():
    tokenizer = load_tokenizer()
    words = rare_words(tokenizer, 3)
    assert "sks" in dict(words)
    assert [token for _, token in words] == sorted((token for _, token in words), reverse=True)
    for word, token in words:
        assert 2 <= len(word) <= 3
        assert tokenizer(f"a {word} {word}", add_special_tokens=False).input_ids.count(token) == 2
    assert {len(word) for word, _ in rare_words(tokenizer, 2)} == {2}


def test_the_word_goes_where_the_rare_one_stood():
    assert around_the_rare_word("a photo of a sks dog", "a photo of a dog") == ("a photo of a", "dog")
    assert around_the_rare_word("xxy5syt00 Dog", "a dog") == ("", "Dog")
    with pytest.raises(UserError, match=r"model\.data\.instance_prompt 'a dog' has no word"):
        around_the_rare_word("a dog", "a photo of a dog")


@pytest.mark.slow
def test_words_the_base_ignores_come_first(tmp_path):
    words = ["identifier.candidates=4", "identifier.num_images=2", "model.data.sampler.inference_steps=5"]
    table = tmp_path / "words.csv"
    found = identifier(compose([*words, f"identifier.out_path={table}", "trainer.accelerator=cpu"]))
    assert len(found) == 4
    assert [one.reaction for one in found] == sorted(one.reaction for one in found)
    with table.open() as file:
        assert [row["word"] for row in csv.DictReader(file)] == [one.word for one in found]
    assert identifier(compose([*words, "trainer.accelerator=cpu"])) == found
    with pytest.raises(UserError, match=r"identifier\.max_characters=1"):
        identifier(compose([*words, "identifier.max_characters=1"]))
