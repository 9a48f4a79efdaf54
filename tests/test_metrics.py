"""Scores by hand, the pocket encoders' formulas, and the trade-off that chooses and stops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth import UserError, compose
from dreambooth.config import build
from dreambooth.metrics.intervals import interval, mean
from dreambooth.metrics.measure import Asked, Subject, metrics_of, table, unheard
from dreambooth.metrics.pictures import Pictures
from dreambooth.metrics.pocket import PocketClip, PocketLpips, PocketViT
from dreambooth.metrics.scores import ClipI, ClipT, Copy, Dino, Div, Pres
from dreambooth.metrics.suite import Suite
from dreambooth.metrics.tradeoff import Tradeoff
from dreambooth.pocket import ready
from dreambooth.prompts import without_identifier

DIRECTIONS = {"red": (1.0, 0.0), "green": (0.0, 1.0), "both": (0.6, 0.8)}


class Compass:
    """An encoder one can compute by hand: every colour and word is a direction in the plane."""

    name = "compass"
    model = torch.nn.Linear(1, 1)

    def images(self, pictures):
        names = {(255, 0, 0): "red", (0, 255, 0): "green", (153, 204, 0): "both"}
        return torch.tensor([DIRECTIONS[names[picture.getpixel((0, 0))]] for picture in pictures])

    def texts(self, prompts):
        return torch.tensor([DIRECTIONS[prompt] for prompt in prompts])

    def distances(self, pictures):
        features = self.images(pictures)
        return 1 - features @ features.T


def colour(*names: str) -> list[Image.Image]:
    pixel = {"red": (255, 0, 0), "green": (0, 255, 0), "both": (153, 204, 0)}
    return [Image.new("RGB", (8, 8), pixel[name]) for name in names]


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return ready.photographs("dog")


def test_likeness_is_the_mean_cosine_over_all_pairs():
    photos, drawn = Pictures(colour("red", "both")), Pictures(colour("red", "green"), ["red", "red"])
    for score in (Dino(), ClipI(), Pres()):
        assert score.generated(Compass(), drawn, photos).tolist() == pytest.approx([(1 + 0.6) / 2, (0 + 0.8) / 2])
    assert Dino().real(Compass(), photos).tolist() == pytest.approx([0.6, 0.6])  # no photograph with itself
    assert Pres().real(Compass(), photos).isnan().all()


def test_prompt_likeness_compares_each_picture_with_its_own_text():
    drawn = Pictures(colour("red", "green", "both"), ["x", "y", "z"], texts=["both", "green", "red"])
    assert ClipT().generated(Compass(), drawn, Pictures([])).tolist() == pytest.approx([0.6, 1.0, 0.6])


def test_diversity_is_the_mean_distance_within_a_prompt():
    drawn = Pictures(colour("red", "green", "both", "red"), ["a", "a", "a", "b"])
    values = Div().generated(Compass(), drawn, Pictures([]))
    assert values[:3].tolist() == pytest.approx([(1 + 0.4) / 2, (1 + 0.2) / 2, (0.4 + 0.2) / 2])
    assert values[:3].mean().item() == pytest.approx((1 + 0.4 + 0.2) / 3)  # the mean over pairs
    assert values[3].isnan()  # one picture has no diversity, and not a diversity of 0


def test_copy_looks_at_the_nearest_photograph():
    photos, drawn = Pictures(colour("green", "red", "both")), Pictures(colour("red", "both"), ["a", "a"])
    assert Copy().generated(Compass(), drawn, photos).tolist() == pytest.approx([1.0, 1.0])
    assert Copy().nearest(Compass(), drawn, photos) == [1, 2]
    assert Copy().real(Compass(), photos).tolist() == pytest.approx([0.8, 0.6, 0.8])


def test_a_suite_gives_every_picture_its_row_whatever_the_order():
    suite = Suite({"dino": Compass(), "clip": Compass(), "lpips": None}, [Dino(), ClipT(), Pres(), Div(), Copy()])
    photos = Pictures(colour("red", "both"))
    images, prompts = colour("red", "green", "both"), ["red", "red", "green"]
    rows = suite.rows("subject", Pictures(images, prompts), photos)
    turned = suite.rows("subject", Pictures(images[::-1], prompts[::-1]), photos)
    assert turned == rows[::-1]
    assert [row["div"] for row in rows] == [None] * 3  # no encoder
    assert [row["pres"] for row in rows] == [None] * 3  # of the class only
    assert suite.rows("class", Pictures(images, prompts), photos)[1]["pres"] == pytest.approx(0.4)
    assert [row["nearest"] for row in rows] == [0, 1, 1]
    assert suite.rows("subject", Pictures([]), photos) == []


def test_the_order_of_averaging_is_a_choice_that_is_printed():
    pictures = [("red", 0.9), ("red", 0.6), ("red", 0.3), ("green", 0.2), ("both", None)]
    rows = [{"set": "after", "role": "subject", "prompt": prompt, "dino": value} for prompt, value in pictures]
    rows += [{"set": "real", "role": "photo", "prompt": None, "dino": value} for value in (0.7, 0.8, 0.9)]
    found = {}
    for average in ("pictures", "prompts"):
        metrics = metrics_of(Suite({"dino": Compass()}, [Dino()], average=average), rows)
        assert metrics["average"] == average
        assert metrics["real"]["dino"] == pytest.approx(0.8)  # a photograph has no prompt: each counts once
        assert metrics["intervals"]["real"]["dino"] == interval([0.7, 0.8, 0.9])
        found[average] = metrics
    values = [value for _, value in pictures]
    assert found["pictures"]["after"]["dino"] == mean(values)  # to the last digit
    assert found["pictures"]["intervals"]["after"]["dino"] == interval(values)
    assert found["prompts"]["after"]["dino"] == mean([mean(values[:3]), 0.2])
    assert found["prompts"]["intervals"]["after"]["dino"] == interval([mean(values[:3]), 0.2])
    assert "means count every picture once" in table(found["pictures"])
    assert "means count every prompt (the mean of its pictures) once" in table(found["prompts"])
    assert metrics_of(Suite({"dino": Compass()}, [Dino()]), rows) == found["pictures"]


def test_a_prompt_of_two_subjects_is_two_prompts():
    rows = [{"prompt": "red", "subject": name, "dino": value} for name, value in (("a", 0.0), ("a", 0.6), ("b", 0.9))]
    assert Suite({"dino": Compass()}, [Dino()], average="prompts").summary(rows) == {"dino": pytest.approx(0.6)}


def test_without_photographs_only_the_prompt_counts():
    suite = Suite({"dino": Compass(), "clip": Compass()}, [Dino(), ClipT(), Copy()])
    (row,) = suite.rows("subject", Pictures(colour("red"), ["both"]), Pictures([]))
    assert row == {"dino": None, "clip_t": pytest.approx(0.6), "copy": None, "nearest": None}
    assert suite.real_rows(Pictures([])) == []


def test_a_single_photograph_has_no_ceiling():
    suite = Suite({"dino": Compass(), "clip": Compass(), "lpips": Compass()}, [Dino(), ClipI(), Div(), Copy()])
    (row,) = suite.real_rows(Pictures(colour("red")))
    assert row == {"dino": None, "clip_i": None, "div": None, "copy": None, "nearest": None}


def test_a_prompt_without_its_identifier_lacks_nothing_else():
    names = ("a photo of a sks dog", "a photo of a dog")
    assert without_identifier("a photo of a sks dog on the beach", *names) == "a photo of a dog on the beach"
    assert without_identifier("Sks, a dog", *names) == "a dog"
    marks = ("a photo of sks, a dog", "a photo of a dog")
    assert without_identifier("a photo of sks, a dog on the beach", *marks) == "a photo of a dog on the beach"
    assert without_identifier("a task for a dog", *names) == "a task for a dog"


def test_means_and_intervals_leave_out_what_is_undefined():
    assert mean([1.0, None, 2.0, float("nan")]) == 1.5
    assert mean([None]) is None
    assert interval([1.0, None]) is None
    assert interval([0.3, 0.3, 0.3]) == [0.3, 0.3]
    values = np.random.default_rng(1).normal(5, 1, 400).tolist()
    low, high = interval(values)
    assert interval(values) == [low, high]
    assert (high - low) == pytest.approx(2 * 1.96 / 400**0.5, rel=0.15)  # the normal theory's width
    assert low < mean(values) < high


@pytest.mark.parametrize("encoder", [PocketClip(), PocketViT()], ids=lambda encoder: encoder.name)
def test_an_encoder_does_not_care_for_the_batch(encoder, photographs):
    many = photographs * 5  # more than one batch
    together = encoder.images(many)
    assert together.shape == (25, 128)
    assert torch.allclose(together.norm(dim=-1), torch.ones(25), atol=1e-5)
    assert torch.allclose(together[:5], torch.cat([encoder.images([photo]) for photo in photographs]), atol=1e-5)


def test_pocket_encoders_crop_what_is_not_square(photographs):
    wide = Image.new("RGB", (128, 64))
    wide.paste(photographs[0], (32, 0))
    assert torch.allclose(PocketViT().images([wide]), PocketViT().images([photographs[0]]))


def test_pocket_lpips_is_the_formula_over_its_blocks(photographs):
    encoder = PocketLpips()
    table = encoder.distances(photographs)
    assert torch.equal(table.diagonal(), torch.zeros(5))
    assert torch.allclose(table, table.T)
    pixels = torch.stack([torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 127.5 - 1 for photo in photographs[:2]])
    total, hidden = 0.0, encoder.model.patch_embed(pixels)
    with torch.no_grad():
        hidden = encoder.model._pos_embed(hidden)
        for block in encoder.model.blocks:
            hidden = block(hidden)
            one, two = (row / row.norm(dim=-1, keepdim=True) for row in hidden[:, 1:])
            total += (one - two).pow(2).sum(-1).mean().item()
    assert table[0, 1].item() == pytest.approx(total, rel=1e-4)


def test_the_metrics_node_builds_a_suite_and_its_table_reads(photographs):
    suite = build(compose().metrics)
    photos = Pictures(photographs)
    rows = [{"set": "real", **row} for row in suite.real_rows(photos)]
    drawn = Pictures(photographs[:2], ["a photo of a dog"] * 2)
    rows += [{"set": kind, **row} for kind in ("before", "after") for row in suite.rows("subject", drawn, photos)]
    metrics = metrics_of(suite, rows)
    assert set(metrics["after"]) == {"dino", "clip_i", "clip_t", "pres", "div", "copy"}
    assert metrics["after"]["pres"] is None
    assert metrics["after"]["copy"] == pytest.approx(1, abs=1e-5)
    assert metrics["real"]["dino"] > 0.8  # one individual
    text = table(metrics)
    assert len(text.splitlines()) == 8  # the scores under their head, and what measured them
    assert "None" not in text
    assert "nan" not in text


def rows_of(*pairs: tuple[float, float], least_drift: float | None = None) -> Tradeoff:
    """Evaluations every 100 steps of (dino, pres), the photographs at 0.9."""
    tradeoff = Tradeoff(0.9, drift_weight=1.0, least_drift=least_drift, patience=2, max_drift=0.5)
    for number, (dino, pres) in enumerate(pairs):
        tradeoff.add(100 * number, {"dino": dino, "pres": pres})
    return tradeoff


def test_the_score_is_fidelity_less_drift():
    tradeoff = rows_of((0.1, 0.2), (0.5, 0.2), (0.9, 0.55), (0.8, 0.2))
    assert [row["score"] for row in tradeoff.rows] == pytest.approx([0, 0.5, 0.5, 0.875])
    assert tradeoff.best() == 300
    assert rows_of((0.1, 0.2), (0.5, -0.5)).rows[1]["score"] == pytest.approx(1.5)
    assert rows_of((0.1, 0.2), (0.5, -0.5), least_drift=0.0).rows[1]["score"] == pytest.approx(0.5)
    assert rows_of((0.1, 0.2), (0.5, 0.55), least_drift=0.0).rows[1]["score"] == pytest.approx(0.0)


def test_training_stops_when_likeness_has_stopped_rising_or_the_class_drifts():
    assert rows_of((0.1, 0.2), (0.5, 0.2), (0.6, 0.2)).verdict() is None
    assert (
        "likeness has not risen in 2 evaluations" in rows_of((0.1, 0.2), (0.5, 0.2), (0.5, 0.2), (0.4, 0.2)).verdict()
    )
    assert rows_of((0.1, 0.2), (0.5, 0.2), (0.5, 0.2), (0.6, 0.2)).verdict() is None
    assert "max_drift=0.5" in rows_of((0.1, 0.2), (0.5, 0.6)).verdict()
    assert rows_of().verdict() is None
    learned = rows_of((0.1, 0.2), (0.66, 0.2))
    assert learned.verdict() is None
    learned.target = 0.69
    assert "70% of the way to the photographs (callbacks.evaluate.target=0.69)" in learned.verdict()


def heard(*values: float | None, unheard: float | None = 0.4, limit: float | None = 0.5) -> Tradeoff:
    """Evaluations of clip_t, the photographs at 0.4 with the prompts; nothing else moves."""
    tradeoff = Tradeoff(0.9, unheard, patience=None, max_forgetting=limit)
    for number, clip_t in enumerate(values):
        tradeoff.add(100 * number, {"dino": 0.1, "pres": 0.2, "clip_t": clip_t})
    return tradeoff


def test_training_stops_when_the_prompts_are_forgotten():
    assert heard(0.7, 0.55).forgetting({"clip_t": 0.55}) == pytest.approx(0.5)
    assert heard(0.7, 0.56).verdict() is None
    assert "80% of the way from what their prompts say to the photographs" in heard(0.7, 0.46).verdict()
    assert "max_forgetting=0.5" in heard(0.7, 0.46).verdict()
    assert heard(0.7, 0.75).forgetting({"clip_t": 0.75}) < 0  # more than the base heard
    chance = heard(0.302, 0.301, unheard=0.3)  # nothing to forget
    for undefined in (heard(0.7, 0.3, limit=None), heard(0.7, 0.3, unheard=None), chance, heard(0.7, None)):
        assert undefined.verdict() is None


def test_what_is_unheard_is_every_photograph_with_every_prompt_of_its_subject():
    def subject(*names: str) -> Subject:
        made = Subject(None, "", "sks", "")
        made.photos = Pictures(colour(*names))
        return made

    one, other = subject("red", "both"), subject("green")
    asked = [Asked(prompt, 1, "subject", one) for prompt in ("red", "green")] + [Asked("both", 4, "class", one)]
    suite = Suite({"clip": Compass()}, [Dino(), ClipT()])
    assert unheard(suite, asked) == pytest.approx((1.0 + 0.0 + 0.6 + 0.8) / 4)
    assert unheard(suite, [*asked, Asked("both", 1, "subject", other)]) == pytest.approx((0.6 + 0.8) / 2)
    assert unheard(Suite({}, [ClipT()]), asked) is None
    assert unheard(suite, [Asked("red", 1, "subject", subject())]) is None


def test_a_tradeoff_without_a_ceiling_takes_the_last_step():
    tradeoff = Tradeoff(None)
    for step in (0, 100, 200):
        tradeoff.add(step, {"dino": 0.3, "pres": None})
    assert tradeoff.best() == 200
    assert tradeoff.verdict() is None


def test_photographs_less_alike_than_the_base_is_to_them_leave_no_way_to_measure_on():
    """A gain would be a negative share, so that the worst step would be kept."""
    tradeoff = Tradeoff(0.3, patience=1, target=0.5)
    for step, dino in ((0, 0.4), (100, 0.6), (200, 0.5), (300, 0.45)):
        tradeoff.add(step, {"dino": dino, "pres": 0.35})
    assert [row["score"] for row in tradeoff.rows] == [None] * 4
    assert tradeoff.fidelity(tradeoff.rows[1]) is None
    assert tradeoff.drift(tradeoff.rows[1]) is None
    assert tradeoff.best() == 300
    assert tradeoff.verdict() is None


def test_prompts_file_is_named_in_the_error(tmp_path: Path):
    from dreambooth.metrics.measure import wanted

    with pytest.raises(UserError, match=r"evaluate\.prompts"):
        wanted({"prompts": [], "num_images_per_prompt": 1, "class_prompts": "a dog", "num_class_images": 1}, [])
