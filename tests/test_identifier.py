"""task=identifier on the pocket model and its tokenizer."""

import csv

import pytest

from dreambooth import UserError, compose
from dreambooth.identifier import identifier, single_token_words
from dreambooth.pocket.encoders import load_tokenizer
from dreambooth.prompts import around_identifier, identifier_of


def test_candidates_are_short_rare_and_one_token():
    tokenizer = load_tokenizer()
    words = single_token_words(tokenizer, 3)
    assert "sks" in dict(words)
    assert [token for _, token in words] == sorted((token for _, token in words), reverse=True)
    for word, token in words:
        assert 2 <= len(word) <= 3
        assert tokenizer(f"a {word} {word}", add_special_tokens=False).input_ids.count(token) == 2
    assert {len(word) for word, _ in single_token_words(tokenizer, 2)} == {2}


def test_the_word_goes_where_the_rare_one_stood():
    assert around_identifier("a photo of a sks dog", "a photo of a dog") == ("a photo of a", "dog")
    assert around_identifier("xxy5syt00 Dog", "a dog") == ("", "Dog")
    assert around_identifier("A photo of a sks dog.", "a photo of a dog") == ("A photo of a", "dog.")
    assert identifier_of("a photo of sks, a dog !", "a photo of a dog") == "sks"
    with pytest.raises(UserError, match=r"which of 'sks tiny' learns\?"):
        identifier_of("a photo of a sks tiny dog", "a photo of a dog")
    with pytest.raises(UserError, match=r"model\.data\.instance_prompt 'a dog' has no word"):
        around_identifier("a dog", "a photo of a dog")


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
