"""benchmark.runs_dir: trainings that several benchmarks have in common."""

import os
import time
from pathlib import Path

import pytest

from dreambooth import UserError, compose
from dreambooth.benchmark.protocol import tasks_of
from dreambooth.benchmark.shared import claimed, settings_key
from dreambooth.benchmark.task import benchmark, tree_of
from tests.layouts import small
from tests.processes import FORK_WARNING, start


def key_of(*words: str) -> str:
    """The key of the dog's training by the short protocol."""
    cfg = compose(["experiment=short", *words])
    dog = next(task for task in tasks_of(cfg.benchmark) if task.name == "dog")
    return settings_key(tree_of(cfg, dog, Path("run")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["model.prior_loss_weight=1.0", "name=prior_weight"],
        ["experiment=table4", "benchmark.noun=dog"],
        ["experiment=table5", "benchmark.num_photos=5"],
        ["benchmark.subjects=[dog,teapot]", "hydra.run.dir=elsewhere"],
        ["benchmark.runs_dir=elsewhere", "callbacks.checkpoint.save_last_k=3"],
    ],
)
def test_what_would_be_trained_alike_has_one_key(words: list[str]) -> None:
    assert key_of(*words) == key_of()


@pytest.mark.slow
def test_what_would_be_trained_otherwise_has_another() -> None:
    words = "seed=1 model.prior_loss_weight=0.3 benchmark.noun=boot benchmark.num_images_per_prompt=2".split()
    words += [f"benchmark.num_photos={count}" for count in (1, 2)]
    assert len({key_of(), *map(key_of, words)}) == len(words) + 1


@pytest.mark.slow
def test_a_training_that_another_benchmark_made_is_not_made_again(tiny_sd, layout, tmp_path) -> None:
    runs = tmp_path / "runs"
    words = [*small(tiny_sd, layout, tmp_path / "one"), f"benchmark.runs_dir={runs}"]

    def made() -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}

    first, before = benchmark(compose(words)), made()
    assert [name.partition("-")[0] for name in sorted(before)] == ["dog", "teapot"]
    second = benchmark(compose([*words, f"hydra.run.dir={tmp_path / 'two'}", "benchmark.subjects=[teapot]"]))
    assert made() == before
    assert second.rows[0] == first.rows[1]
    assert not os.path.isabs(os.readlink(tmp_path / "two" / "teapot"))
    with pytest.raises(UserError, match=r"one/dog is a run with other settings.*ANOTHER_FOLDER"):
        benchmark(compose([*words, "seed=7"]))
    assert made() == before


def train_alike(run: Path, order: Path) -> None:
    """What another process does, once it is its turn."""
    order.with_name("asks").touch()
    with claimed(run):
        order.write_text(order.read_text() + "second")


@pytest.mark.filterwarnings(FORK_WARNING)
def test_who_comes_second_waits_until_the_first_is_done(tmp_path: Path) -> None:
    run, order = tmp_path / "runs" / "dog", tmp_path / "order"
    with claimed(run):
        other = start(train_alike, run, order)
        deadline = time.monotonic() + 30
        while not order.with_name("asks").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        order.write_text("first ")
    other.join(30)
    assert order.read_text() == "first second"


@pytest.mark.filterwarnings(FORK_WARNING)
def test_a_killed_process_leaves_its_claim(tmp_path: Path) -> None:
    holder = start(hold, tmp_path / "dog")
    deadline = time.monotonic() + 30
    while not (tmp_path / "held").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    holder.kill()
    holder.join()
    with claimed(tmp_path / "dog"):
        assert (tmp_path / "held").exists()


def hold(run: Path) -> None:
    with claimed(run):
        run.with_name("held").touch()
        time.sleep(60)
