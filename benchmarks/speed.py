"""Our training next to diffusers' own script: seconds a step, memory, and the losses on the same noise.

    pip install accelerate
    python -m benchmarks.speed train_dreambooth.py            # --quick: a look in a minute

The script is examples/dreambooth/train_dreambooth.py of the diffusers version that is installed. It runs as it is, in
a process of its own, beside ours: same base, photos, class pictures, batch, precision and optimizer. They take turns,
five steps each while the others stand still, so a machine that is slow for a minute is slow for all. The third in turn
is the script with its encoding taken out: no faster step is to be had by caching alone. Ends with 1 if the losses
differ or ours is slower at any batch.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from dreambooth.metrics.intervals import interval

ROOT = Path(__file__).resolve().parents[1]
CONTENDERS = ("diffusers", "ours", "without_encoding")
TURN = 5  # steps a turn; those of the first are not counted
PROMPT, CLASS_PROMPT, LR = "a photo of a sks dog", "a photo of a dog", 1e-4
PRECISIONS = {"32-true": "no", "bf16-mixed": "bf16", "16-mixed": "fp16"}
SCRIPT_URL = "https://raw.githubusercontent.com/huggingface/diffusers/v{}/examples/dreambooth/train_dreambooth.py"
FIRST_STEP, LAST_STEP = 1e-5, 1e-3  # how far losses may be apart, relatively: rounding, and what training makes of it


def options() -> argparse.Namespace:
    """What may be typed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="diffusers' train_dreambooth.py")
    parser.add_argument("--lora", type=int, metavar="RANK", help="the script is train_dreambooth_lora.py: adapters")
    parser.add_argument("--base", type=Path, help="a diffusers folder (default: the pocket model)")
    parser.add_argument("--photos", type=Path, help="the subject (default: the shipped dog)")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true", help="of the timings")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="photos a step, and class pictures")
    parser.add_argument("--steps", type=int, default=100, help=f"of each run, a multiple of {TURN}")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, for a machine that others use too")
    parser.add_argument("--quick", action="store_true", help="fifteen steps at one batch")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"), help="scratch, made anew")
    args = parser.parse_args()
    if args.steps % TURN or args.steps < 2 * TURN:
        parser.error(f"--steps {args.steps}: take a multiple of {TURN}, at least {2 * TURN}")
    if args.quick:
        args.batches, args.steps = args.batches[:1], 3 * TURN
    if args.base is None or args.photos is None:
        from dreambooth.pocket import SUBJECTS, WEIGHTS

        args.base, args.photos = args.base or WEIGHTS, args.photos or SUBJECTS / "dog"
    for path in (args.script, args.base, args.photos):
        if not path.exists():
            parser.error(f"{path} is not there; train_dreambooth.py: {SCRIPT_URL.format(version('diffusers'))}")
    args.script, args.base, args.photos, args.out = (
        path.resolve() for path in (args.script, args.base, args.photos, args.out)
    )
    return args


def ours(args: argparse.Namespace, batch: int, precision: str) -> list[str]:
    """The overrides of our run; the class pictures and the caches are shared by all runs."""
    values = {
        "model.from_pretrained": args.base,
        "model.micro_batch_size": batch,
        "model.optim.lr": LR,
        "model.data.instance_dir": args.photos,
        "model.data.instance_prompt": PROMPT,
        "model.data.regularization_dir": args.out / "class",
        "model.data.regularization_prompt": CLASS_PROMPT,
        "model.data.num_reg_images": 4 * max(args.batches),
        "model.data.cached_instance_dir": args.out / "cache",
        "model.data.resolution": args.resolution,
        "trainer.max_steps": args.steps,
        "trainer.precision": precision,
        "callbacks.sample_grid": "null",
        "callbacks.evaluate": "null",
    }
    if args.lora:  # the script's alpha is the rank
        values |= {"model/tuning": "lora", "model.tuning.rank": args.lora, "model.tuning.alpha": args.lora}
    return ["model=pocket", "model/weighting=uniform", *(f"{key}={value}" for key, value in values.items())]


def theirs(args: argparse.Namespace, batch: int, precision: str) -> list[str]:
    """The arguments of diffusers' script for the same run."""
    values = {
        "pretrained_model_name_or_path": args.base,
        "instance_data_dir": args.photos,
        "instance_prompt": PROMPT,
        "class_data_dir": args.out / "class",
        "class_prompt": CLASS_PROMPT,
        "num_class_images": 4 * max(args.batches),
        "resolution": args.resolution,
        "train_batch_size": batch,
        "max_train_steps": args.steps,
        "learning_rate": LR,
        "mixed_precision": PRECISIONS[precision],
        "output_dir": args.out / "diffusers",
        "seed": 0,
    }
    if args.lora:
        values["rank"] = args.lora
    flags = ["--with_prior_preservation", "--center_crop"]
    return flags + [word for key, value in values.items() for word in (f"--{key}", str(value))]


def command(args: argparse.Namespace, name: str, batch: int, precision: str) -> list[object]:
    """What runs one contender under the stopwatch, in a folder of its own."""
    folder = args.out / f"{name}_{batch}"
    shutil.rmtree(folder, ignore_errors=True)
    mode = {"without_encoding": "bare", "losses": "record"}.get(name, "time")
    program: list[object] = [args.script, *theirs(args, batch, precision)]
    if name == "ours":
        program = [ROOT / "launch.py", *ours(args, batch, precision), f"hydra.run.dir={folder / 'run'}"]
    elif mode == "bare":
        program.append("--pre_compute_text_embeddings")
    return [ROOT / "benchmarks" / "stopwatch.py", folder, mode, *program]


def launch(
    args: argparse.Namespace, name: str, words: list[object], turns: tuple[int, int] | None = None
) -> "subprocess.Popen[bytes]":
    """Run Python on ``words``, what it says into NAME.log; ``turns`` are the descriptors it waits and calls on."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if turns:
        env["STOPWATCH_TURNS"] = f"{turns[0]},{turns[1]},{TURN}"
    with (args.out / f"{name}.log").open("w") as file:
        line = [sys.executable, *(str(word) for word in words)]
        return subprocess.Popen(line, stdout=file, stderr=file, cwd=args.out, env=env, pass_fds=turns or ())


def finish(args: argparse.Namespace, name: str, process: "subprocess.Popen[bytes]") -> None:
    """Wait for the end; if it failed, show its last lines and stop."""
    if process.wait():
        log = args.out / f"{name}.log"
        print(*log.read_text().splitlines()[-8:], sep="\n")
        url = SCRIPT_URL.format(version("diffusers"))
        sys.exit(f"{name} ended with {process.returncode}, see {log}. If it asks for another diffusers, give {url}")


def in_turns(args: argparse.Namespace, batch: int) -> dict[str, tuple[list[float], float]]:
    """Mean seconds a step of every turn but the first, and peak memory in MiB, of each contender."""
    runs = {}
    for name in CONTENDERS:
        (go, start), (ended, done) = os.pipe(), os.pipe()
        process = launch(args, f"{name}_{batch}", command(args, name, batch, args.precision), (go, done))
        os.close(go)
        os.close(done)  # the process has the other ends: when it dies, reading gives nothing
        runs[name] = (process, start, ended)
    for turn in range(args.steps // TURN):
        for name, (process, start, ended) in runs.items():
            if turn:
                os.write(start, b".")
            if not os.read(ended, 1):
                finish(args, f"{name}_{batch}", process)
    for _, start, ended in runs.values():  # the last byte lets them all go on to their ends
        os.write(start, b".")
        os.close(start)
        os.close(ended)
    found = {}
    for name, (process, _, _) in runs.items():
        finish(args, f"{name}_{batch}", process)
        noted = json.loads((args.out / f"{name}_{batch}" / "steps.json").read_text())
        steps = [both[args.cpu_time] for both in noted["seconds"]][TURN - 1 :]
        found[name] = (
            [sum(steps[at : at + TURN]) / TURN for at in range(0, len(steps), TURN)],
            noted["peak_memory_mb"],
        )
    return found


def same_losses(args: argparse.Namespace) -> bool:
    """Print the losses of diffusers' script and those of our module on what the script read and drew, in float32."""
    from safetensors.torch import load_file

    from benchmarks.replay import replay

    batch = args.batches[0]
    finish(args, "losses", launch(args, "losses", command(args, "losses", batch, "32-true")))
    tape = load_file(args.out / f"losses_{batch}" / "tape.safetensors")
    own = [row["loss"] for row in replay(tape, ours(args, batch, "32-true"), args.out)]
    pairs = list(zip(tape["loss"].tolist(), own, strict=True))
    differences = [abs(a - b) / a for a, b in pairs]
    print(f"\nlosses on the same noise, batch {batch}\n{'step':>5}{'diffusers':>12}{'ours':>12}{'apart':>10}")
    for step in sorted({*range(0, len(pairs), max(1, len(pairs) // 10)), len(pairs) - 1}):
        print(f"{step + 1:5}{pairs[step][0]:12.6f}{pairs[step][1]:12.6f}{differences[step]:10.1e}")
    return differences[0] <= FIRST_STEP and max(differences) <= LAST_STEP


def race(args: argparse.Namespace) -> bool:
    """Print seconds a step and memory of the contenders at every batch; whether ours was never the slower one."""
    print(f"\n{'batch':>5}{'diffusers':>12}{'ours':>9}{'ratio':>8}{'95 %':>14}{'bound':>8}{'memory':>18}{'ratio':>8}")
    never_slower = True
    for batch in args.batches:
        (a, a_mb), (b, b_mb), (bare, _) = in_turns(args, batch).values()
        ratios, bound = [x / y for x, y in zip(a, b, strict=True)], [x / y for x, y in zip(a, bare, strict=True)]
        low, high = interval(ratios) or (float("nan"), float("nan"))
        ratio, best = statistics.median(ratios), statistics.median(bound)
        seconds = f"{statistics.median(a):10.4f} s{statistics.median(b):7.4f} s{ratio:8.2f}"
        memory = f"{a_mb:10.0f}{b_mb:5.0f} MiB{a_mb / b_mb:8.2f}"
        print(f"{batch:5}{seconds}{f'{low:.2f} to {high:.2f}':>14}{best:8.2f}{memory}", flush=True)
        never_slower &= ratio >= 1
    print("ratio: diffusers / ours, median of the turns, with the interval of their mean; bound: diffusers / diffusers")
    print("without encoding.")
    return never_slower


def main() -> int:
    """Draw the class pictures, compare the losses, then the speed."""
    args = options()
    if args.out.exists() and not (args.out / "prepare.log").exists():
        sys.exit(f"{args.out} is no scratch folder of a benchmark: give another --out")
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    quick_sampler = "model.data.sampler.inference_steps=10"
    words = [ROOT / "launch.py", "task=prepare", *ours(args, 1, "32-true"), quick_sampler]
    finish(args, "prepare", launch(args, "prepare", words))
    (args.out / "class" / "manifest.json").unlink()  # the script reads every file as a picture
    equal = same_losses(args)
    fast = race(args)
    return 0 if equal and fast else 1


if __name__ == "__main__":
    sys.exit(main())
