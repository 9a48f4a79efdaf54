"""Steps of diffusers' own script, taken down for tests/test_parity.py: what each read, drew and lost.

    pip install accelerate
    python -m benchmarks.record train_dreambooth.py

The script is examples/dreambooth/train_dreambooth.py of diffusers, unchanged; every setting runs in a process of its
own on the tiny base that the test builds too. Writes tests/fixtures/diffusers.safetensors, tensors named SETTING.NAME.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.speed import CLASS_PROMPT, LR, PROMPT, ROOT
from dreambooth.pocket import SUBJECTS
from tests.test_parity import FIXTURE, STILL, write_base

SNR = ["--snr_gamma", "5"]
SETTINGS: dict[str, tuple[str, int, int, float, list[str]]] = {  # prediction type, steps, batch, rate, arguments
    "prior": ("epsilon", 6, 1, LR, ["--with_prior_preservation"]),
    "min_snr": ("epsilon", 2, 2, LR, SNR),
    "min_snr_v": ("v_prediction", 2, 2, LR, SNR),
    "min_snr_prior": ("epsilon", 6, 1, STILL, ["--with_prior_preservation", *SNR]),
}


def record(script: Path, name: str, scratch: Path) -> Path:
    """Run one setting; the tape that it leaves."""
    prediction_type, steps, batch, rate, more = SETTINGS[name]
    values = {
        "pretrained_model_name_or_path": write_base(scratch / f"base_{name}", prediction_type),
        "instance_data_dir": SUBJECTS / "dog",
        "instance_prompt": PROMPT,
        "class_data_dir": SUBJECTS / "cat",  # any pictures: what matters is what is made of them
        "class_prompt": CLASS_PROMPT,
        "num_class_images": len(list((SUBJECTS / "cat").iterdir())),
        "resolution": 8,
        "train_batch_size": batch,
        "max_train_steps": steps,
        "learning_rate": rate,
        "mixed_precision": "no",
        "output_dir": scratch / "out",
        "seed": 0,
    }
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    program = [sys.executable, ROOT / "benchmarks" / "stopwatch.py", scratch / name, "record", script, "--center_crop"]
    subprocess.run([*map(str, program), *words, *more], cwd=scratch, check=True)
    return scratch / name / "tape.safetensors"


def main() -> None:
    """Record all settings into the fixture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="diffusers' train_dreambooth.py")
    script = parser.parse_args().script.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        tapes = {name: load_file(record(script, name, Path(scratch))) for name in SETTINGS}
    tensors = {f"{name}.{key}": value for name, tape in tapes.items() for key, value in tape.items()}
    save_file(tensors, FIXTURE)
    print(f"{FIXTURE}: {FIXTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
