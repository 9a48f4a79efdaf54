"""Our training next to diffusers' own script: seconds a step, memory, and the losses on the same noise.

    pip install accelerate
    python -m benchmarks.speed train_dreambooth.py            # --quick: a look in a minute

The script is examples/dreambooth/train_dreambooth.py of the diffusers version that is installed. It runs as it is, in
a process of its own, in turns with ours: same base, photos, class pictures, batch, precision and optimizer. The third
in turn is the script with its encoding taken out: no faster step is to be had by caching alone. Ends with 1 if the
losses differ or ours is slower at any batch.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3  # steps that are not counted
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
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="how often the contenders take turns")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, for a machine that others use too")
    parser.add_argument("--quick", action="store_true", help="one round of ten steps at one batch")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"), help="scratch, made anew")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.steps, args.rounds = args.batches[:1], 10, 1
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


def launch(args: argparse.Namespace, name: str, command: list[object]) -> None:
    """Run Python on ``command`` and keep what it says in a file; its last lines are shown if it fails."""
    log = args.out / f"{name}.log"
    with log.open("w") as file:
        words = [sys.executable, *(str(word) for word in command)]
        done = subprocess.run(
            words, stdout=file, stderr=file, cwd=args.out, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    if done.returncode:
        print(*log.read_text().splitlines()[-8:], sep="\n")
        url = SCRIPT_URL.format(version("diffusers"))
        sys.exit(f"{name} ended with {done.returncode}, see {log}. If it asks for another diffusers, give {url}")


def timed(args: argparse.Namespace, name: str, batch: int, precision: str) -> tuple[float, float]:
    """Median seconds of a step, and peak memory in MiB, of one run in a process of its own."""
    folder = args.out / f"{name}_{batch}"
    shutil.rmtree(folder, ignore_errors=True)
    mode = {"without_encoding": "bare", "losses": "record"}.get(name, "time")
    if name == "ours":
        program = [ROOT / "launch.py", *ours(args, batch, precision), f"hydra.run.dir={folder / 'run'}"]
    else:
        program = [args.script, *theirs(args, batch, precision)]
        program += ["--pre_compute_text_embeddings"] * (mode == "bare")
    launch(args, folder.name, [ROOT / "benchmarks" / "stopwatch.py", folder, mode, *program])
    noted = json.loads((folder / "steps.json").read_text())
    clock = [both[args.cpu_time] for both in noted["clock"][WARM_UP:]]
    return statistics.median(b - a for a, b in itertools.pairwise(clock)), noted["peak_memory_mb"]


def same_losses(args: argparse.Namespace) -> bool:
    """Print the losses of diffusers' script and those of our module on what the script read and drew, in float32."""
    from safetensors.torch import load_file

    from benchmarks.replay import replay

    batch = args.batches[0]
    timed(args, "losses", batch, "32-true")
    tape = load_file(args.out / f"losses_{batch}" / "tape.safetensors")
    pairs = list(zip(tape["loss"].tolist(), replay(tape, ours(args, batch, "32-true"), args.out), strict=True))
    differences = [abs(a - b) / a for a, b in pairs]
    print(f"\nlosses on the same noise, batch {batch}\n{'step':>5}{'diffusers':>12}{'ours':>12}{'apart':>10}")
    for step in sorted({*range(0, len(pairs), max(1, len(pairs) // 10)), len(pairs) - 1}):
        print(f"{step + 1:5}{pairs[step][0]:12.6f}{pairs[step][1]:12.6f}{differences[step]:10.1e}")
    return differences[0] <= FIRST_STEP and max(differences) <= LAST_STEP


def race(args: argparse.Namespace) -> bool:
    """Print seconds a step and memory of the contenders at every batch, medians over the rounds."""
    print(f"\n{'batch':>5}{'diffusers':>12}{'ours':>9}{'ratio':>8}{'bound':>8}{'diffusers':>13}{'ours':>9}{'ratio':>8}")
    contenders = ("diffusers", "ours", "without_encoding")
    never_slower = True
    for batch in args.batches:
        rounds = [[timed(args, name, batch, args.precision) for name in contenders] for _ in range(args.rounds)]
        figures = [
            [statistics.median(column) for column in zip(*runs, strict=True)] for runs in zip(*rounds, strict=True)
        ]
        (a, a_mb), (b, b_mb), (bare, _) = figures
        seconds = f"{a:10.4f} s{b:7.4f} s{a / b:8.2f}{a / bare:8.2f}"
        print(f"{batch:5}{seconds}{a_mb:9.0f} MiB{b_mb:5.0f} MiB{a_mb / b_mb:8.2f}", flush=True)
        never_slower &= b <= a
    print("ratio: diffusers / ours. bound: diffusers / diffusers without encoding.")
    return never_slower


def main() -> int:
    """Draw the class pictures, compare the losses, then the speed."""
    args = options()
    if args.out.exists() and not (args.out / "prepare.log").exists():
        sys.exit(f"{args.out} is no scratch folder of a benchmark: give another --out")
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    quick_sampler = "model.data.sampler.inference_steps=10"
    launch(args, "prepare", [ROOT / "launch.py", "task=prepare", *ours(args, 1, "32-true"), quick_sampler])
    (args.out / "class" / "manifest.json").unlink()  # the script reads every file as a picture
    equal = same_losses(args)
    fast = race(args)
    return 0 if equal and fast else 1


if __name__ == "__main__":
    sys.exit(main())
