"""The real encoders, with random weights in local files: what they see and compute, what is said without them."""

import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import alexnet, squeezenet1_1, vgg

from dreambooth import UserError, compose
from dreambooth.config import build
from dreambooth.families.folder import locate
from dreambooth.metrics import encoders
from dreambooth.metrics.encoders import Lpips, OpenClip, TimmViT, lpips
from dreambooth.pocket import ready

NETS = {  # of LPIPS: torchvision's layers, and how many of them it looks at
    "alex": (lambda: alexnet().features, 12),
    "vgg": (lambda: vgg.make_layers(vgg.cfgs["D"]), 30),
    "squeeze": (lambda: squeezenet1_1().features, 13),
}


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return ready.photographs("dog")


def backbone(net: str, folder: Path) -> tuple[torch.nn.Sequential, str]:
    """Torchvision's layers of a network with random weights, and the file that they lie in by their names there."""
    make, count = NETS[net]
    torch.manual_seed(0)
    layers, path = make(), str(folder / f"{net}.pth")
    torch.save({f"features.{name}": value for name, value in layers.state_dict().items()}, path)
    return layers[:count].eval(), path


def pixels_of(photos: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 127.5 - 1 for photo in photos])


@pytest.mark.slow
def test_the_default_dino_is_the_papers_evaluation(tmp_path):
    """Its shorter side to 256 by bicubic, the middle 224, ImageNet's mean and deviation, and the class token."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch16_224.dino", num_classes=0).eval()
    save_file(vit.state_dict(), tmp_path / "dino.safetensors")
    card = compose(["metrics=default", f"metrics.encoders.dino.checkpoint_path={tmp_path}/dino.safetensors"])
    dino, seen = build(card.metrics.encoders.dino), []
    dino.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (320, 400, 3), dtype=np.uint8))
    features = dino.images([picture])

    middle = picture.resize((320, 256), Image.Resampling.BICUBIC).crop((48, 16, 272, 240))
    levels = torch.from_numpy(np.array(middle)).permute(2, 0, 1) / 255
    mean, deviation = (torch.tensor(rgb)[:, None, None] for rgb in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = ((levels - mean) / deviation)[None]
    assert torch.allclose(seen[0], expected, atol=1e-5)
    with torch.no_grad():
        token = vit.forward_features(expected)[:, 0]  # behind the last norm
    assert torch.allclose(features, token / token.norm(), atol=1e-5)


def test_the_default_clip_is_mindones_and_of_the_activation_that_its_weights_learned_with():
    clip = compose(["metrics=default"]).metrics.encoders.clip
    assert (clip.model, clip.pretrained) == ("ViT-B-16-quickgelu", "openai")
    assert open_clip.get_model_config(clip.model)["quick_gelu"]
    assert not open_clip.get_model_config("ViT-B-16").get("quick_gelu")
    assert clip.pretrained in open_clip.list_pretrained_tags_by_model(clip.model)


@pytest.mark.slow
def test_a_clip_reads_a_local_file(tmp_path, photographs):
    name = "ViT-S-32-alt"  # the smallest that open_clip knows; the code takes any
    torch.save(open_clip.create_model(name).state_dict(), tmp_path / "clip.pt")
    clip = OpenClip(name, str(tmp_path / "clip.pt"))
    similarity = clip.images(photographs[:2]) @ clip.texts(["a dog", "a cat"]).T
    assert similarity.shape == (2, 2)
    assert similarity.abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_every_backbone_of_lpips_is_torchvisions(net, tmp_path, photographs):
    layers, path = backbone(net, tmp_path)
    encoder, pixels = Lpips(net, path, side=64), pixels_of(photographs[:2])
    with torch.no_grad():
        assert torch.allclose(encoder.model.net(pixels)[-1], layers(pixels), atol=1e-5)
    assert encoder.distances(photographs[:2])[0, 1] > 0


@pytest.mark.slow
def test_lpips_is_torchmetrics_whatever_the_batch(tmp_path, monkeypatch, photographs):
    layers, path = backbone("alex", tmp_path)
    reference = _LPIPS(pretrained=True, net="alex", pnet_rand=True).eval()
    own = reference.net.state_dict()
    reference.net.load_state_dict({key: layers.state_dict()[key.split(".", 1)[1]] for key in own})
    pixels, encoder, sizes = pixels_of(photographs), Lpips("alex", path, side=64), []
    whole = encoder.distances(photographs)
    encoder.model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr(encoders, "BATCH", 2)
    table = encoder.distances(photographs)
    assert sizes == [1, 2, 2, 1, 2, 2]
    assert torch.allclose(table, whole, rtol=1e-5, atol=0)
    with torch.no_grad():
        for i in range(5):
            for j in range(i):
                one = reference(pixels[i : i + 1], pixels[j : j + 1]).item()
                assert (table[i, j].item(), table[j, i].item()) == pytest.approx((one, one), rel=1e-4)
    assert not table.diagonal().any()


@pytest.mark.slow
def test_a_missing_encoder_is_one_line_with_its_key(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    (tmp_path / "pickle.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    wrong = tmp_path / "vgg.pth"
    torch.save({"features.0.weight": torch.zeros(3)}, wrong)
    for make, key in (
        (lambda: OpenClip("ViT-B-16", str(tmp_path / "pickle.pt")), "metrics.encoders.clip.pretrained"),
        (lambda: TimmViT(checkpoint_path=str(tmp_path / "bad.safetensors")), "metrics.encoders.dino.checkpoint_path"),
        (lambda: Lpips("alex", str(tmp_path / "absent.pth")), "metrics.encoders.lpips.backbone_path"),
        (lambda: Lpips("alex", str(wrong)), "metrics.encoders.lpips.backbone_path"),
    ):
        with pytest.raises(UserError, match=key) as error:
            make()
        assert "\n" not in str(error.value)
    assert lpips("alex", None) is None


def test_an_encoder_of_the_hub_that_is_not_there_names_its_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"metrics\.encoders\.dino\.checkpoint_path"):
        TimmViT()


@pytest.mark.parametrize("offline", [True, False])
def test_what_the_hub_does_not_give_is_one_line_at_once(offline, tmp_path, monkeypatch, capfd):
    """Told to be offline, or left to find that nobody answers: no retries, no lines of the libraries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.process_time(), time.perf_counter()
    for load, key in (
        (OpenClip, "metrics.encoders.clip.pretrained"),
        (TimmViT, "metrics.encoders.dino.checkpoint_path"),
        (lambda: locate("nobody/nothing"), "hf download nobody/nothing"),
    ):
        with pytest.raises(UserError, match=f"hub.*{key}") as caught:
            load()
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert time.perf_counter() - began[1] < 10 + 5 * (time.process_time() - began[0])  # 58 seconds of sleep before
    assert constants.HF_HUB_OFFLINE is offline
