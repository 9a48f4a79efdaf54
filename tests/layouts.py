"""A folder in google/dreambooth's layout, small, and a benchmark of it that takes seconds."""

import shutil
from pathlib import Path

from dreambooth.pocket import SUBJECTS
from tests.tiny import RESOLUTION

LAYOUT = """Classes

subject_name,class
dog,dog
teapot,teapot
absent,toy

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a chef outfit'.format(unique_token, class_token),
]
"""


def write_layout(folder: Path) -> Path:
    """A live subject and an object."""
    for name in ("dog", "teapot"):
        shutil.copytree(SUBJECTS / name, folder / name)
    (folder / "prompts_and_classes.txt").write_text(LAYOUT)
    return folder


def small(model: Path, layout: Path, folder: Path) -> list[str]:
    """The words of a benchmark of ``layout`` in ``folder``: two steps, two pictures a prompt."""
    return [
        "task=benchmark",
        "benchmark=paper",
        f"benchmark.folder={layout}",
        f"benchmark.base_dir={folder}-base",
        "benchmark.num_images_per_prompt=2",
        "benchmark.num_class_images=2",
        f"hydra.run.dir={folder}",
        f"model.from_pretrained={model}",
        f"model.data.resolution={RESOLUTION}",
        "model.with_prior_preservation=false",
        "model.data.sampler.inference_steps=1",
        "trainer.accelerator=cpu",
        "trainer.max_steps=2",
        "callbacks.sample_grid=null",
        "callbacks.evaluate.every_n_train_steps=null",
    ]
