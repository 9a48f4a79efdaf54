"""task=identifier on the pocket model and its tokenizer."""

import csv
from types import SimpleNamespace

import pytest
import torch

from dreambooth import UserError, compose
from dreambooth import identifier as module
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


class Family:
    """Draws nothing: a picture is its prompt and its number."""

    tokenizer = load_tokenizer()

    def move(self, device) -> None:
        """It has no weights."""

    def to_pipeline(self) -> None:
        """None is needed."""


def test_a_reaction_is_one_less_the_cosine_of_pictures_of_the_same_noise(monkeypatch):
    """By hand, for two words and two pictures; paired otherwise they come to 0.7 and 1."""
    (moves, _), (stays, _) = single_token_words(Family.tokenizer, 3)[:2]
    seen = {
        "a photo of a dog": [(1.0, 0.0), (0.0, 1.0)],
        f"a photo of a {moves} dog": [(0.6, 0.8), (-0.8, 0.6)],  # 0.6 and 0.6; the other way round 0.8 and -0.8
        f"a photo of a {stays} dog": [(1.0, 0.0), (0.6, 0.8)],  # 1 and 0.8; the other way round 0 and 0.6
    }
    seeds = {}

    def draw_batch(_, pictures):
        seeds[pictures[0]["prompt"]] = [picture["picture_seed"] for picture in pictures]
        return [(picture["prompt"], picture["picture_index"]) for picture in pictures]

    encoder = SimpleNamespace(
        model=torch.nn.Linear(1, 1), images=lambda drawn: torch.tensor([seen[prompt][n] for prompt, n in drawn])
    )
    parts = {"encoders": SimpleNamespace(encoders={"dino": encoder}), "tokenizer": Family()}
    monkeypatch.setattr(module, "build", lambda node: parts["encoders" if "scores" in node else "tokenizer"])
    monkeypatch.setattr(module, "draw_batch", draw_batch)
    found = identifier(compose(["identifier.candidates=2", "identifier.num_images=2", "trainer.accelerator=cpu"]))
    assert [(one.word, one.reaction) for one in found] == [(stays, pytest.approx(0.1)), (moves, pytest.approx(0.4))]
    assert seeds.keys() == seen.keys()
    (same,) = {tuple(each) for each in seeds.values()}
    assert len(set(same)) == 2


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
