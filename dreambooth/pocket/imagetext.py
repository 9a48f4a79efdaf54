"""Gate (b): the image-text model (open_clip). Its text tower, frozen, is the pipeline's text encoder."""

from collections.abc import Sequence

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.figures import CLASSES
from dreambooth.pocket.scenes import Scenes, to_float
from dreambooth.pocket.stage import Stage
from dreambooth.pocket.words import RARE

WIDTH, HEADS, LAYERS, WINDOW = 128, 4, 3, 32


def build(vocabulary: int) -> open_clip.CLIP:
    """Two towers of width 128: 8x8 patches of 64x64 pixels in [-1, 1], and 32 tokens.

    In training the image tower sees a random half of the patches, at half the cost (arXiv 2212.00794).
    """
    vision = CLIPVisionCfg(
        layers=4, width=WIDTH, head_width=WIDTH // HEADS, patch_size=8, image_size=64, patch_dropout=0.5
    )
    text = CLIPTextCfg(context_length=WINDOW, vocab_size=vocabulary, width=WIDTH, heads=HEADS, layers=LAYERS)
    return open_clip.CLIP(embed_dim=WIDTH, vision_cfg=vision, text_cfg=text)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """(B, 32) token ids, padded and cut as Stable Diffusion's pipeline does."""
    options = {"padding": "max_length", "max_length": WINDOW, "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(texts), **options).input_ids


class ImageTextStage(Stage):
    """CLIP's loss; pictures that share a caption in a batch are each other's positives too."""

    def __init__(
        self, scenes: Scenes, tokenizer: CLIPTokenizer, steps: int, seed: int, lr: float = 1e-3, batch: int = 128
    ):
        super().__init__("imagetext", steps, lr, seed)
        self.model = build(len(tokenizer))
        self.scenes, self.batch = scenes, batch
        captions = [scenes.captions(variant) for variant in range(4)]
        self.numbers = {text: i for i, text in enumerate(sorted({c for row in captions for c in row}))}
        self.captions = torch.tensor([[self.numbers[c] for c in row] for row in captions])
        tokens = tokenize(tokenizer, list(self.numbers))
        self.longest = int(tokens.argmax(1).max()) + 1  # the end token has the highest id; behind it is padding
        self.tokens = tokens

    def loss(self, g: torch.Generator) -> Tensor:
        index = torch.randint(len(self.scenes), (self.batch,), generator=g)
        text = self.captions[torch.randint(len(self.captions), (self.batch,), generator=g), index]
        image = self.model.encode_image(to_float(self.scenes.pixels[index]).to(self.device), normalize=True)
        words = self._encode_text(self.tokens[text, : self.longest].to(self.device))
        logits = self.model.logit_scale.exp().clamp(max=100) * image @ words.T
        same = (text[:, None] == text).to(logits)
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def _encode_text(self, tokens: Tensor) -> Tensor:
        """As ``encode_text`` does, without the padding: attention is causal, so the end token never sees it."""
        model, length = self.model, tokens.shape[1]
        hidden = model.token_embedding(tokens) + model.positional_embedding[:length]
        hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))
        ends = hidden[torch.arange(len(tokens)), tokens.argmax(1)]
        return F.normalize(ends @ model.text_projection, dim=-1)


@torch.no_grad()
def accuracy(model: open_clip.CLIP, tokenizer: CLIPTokenizer, scenes: Scenes, batch: int = 250) -> float:
    """How often the right full caption wins among the captions of ``batch`` held-out scenes."""
    captions = [scene.full_caption() for scene in scenes.scenes]
    right = 0
    for start in range(0, len(scenes), batch):
        words = captions[start : start + batch]
        choices = sorted(set(words))
        image = model.encode_image(to_float(scenes.pixels[start : start + batch]), normalize=True)
        text = model.encode_text(tokenize(tokenizer, choices), normalize=True)
        best = (image @ text.T).argmax(1).tolist()
        right += sum(choices[i] == word for i, word in zip(best, words, strict=True))
    return right / len(scenes)


@torch.no_grad()
def name_rare_word(model: open_clip.CLIP, tokenizer: CLIPTokenizer) -> str:
    """Give the name ``sks`` to the rare entry that the text tower tells best from no word; the name that it had.

    No caption has any of them, so which is which is chance. But one that the tower reads like the captions' words
    without a meaning leaves a frozen text encoder nothing to bind a subject to: in CLIP, ``sks`` is plain to see.
    """
    phrases = [f"a photo of a {{}} {noun} {where}" for noun in CLASSES for where in CONTEXTS.values()]
    tower = text_encoder(model, tokenizer)

    def read(word: str) -> Tensor:
        """What the denoiser is given behind the words of each phrase, (phrases, 10, width)."""
        ids = tokenize(tokenizer, [each.format(word) for each in phrases])
        return tower(input_ids=ids).last_hidden_state[:, -10:]

    nothing = read("")
    seen = {word: (read(word) - nothing).norm(dim=-1).mean().item() for word in RARE}
    plainest = max(seen, key=lambda word: seen[word])
    ids = [tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in (RARE[0], plainest)]
    rows = model.token_embedding.weight
    rows[ids] = rows[ids[::-1]]
    return plainest


def text_encoder(model: open_clip.CLIP, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text tower as a CLIPTextModel: the same function, open_clip's joint q/k/v split in three."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=WINDOW,
        hidden_act="gelu",
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    source = model.state_dict()
    state = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    names = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for layer in range(LAYERS):
        ours, theirs = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            joint = source[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
            state |= {f"{ours}.self_attn.{part}_proj.{kind}": value for part, value in zip("qkv", joint, strict=True)}
            state |= {f"{ours}.{new}.{kind}": source[f"{theirs}.{old}.{kind}"] for old, new in names.items()}
    encoder = CLIPTextModel(config).eval()
    encoder.load_state_dict(state, strict=False)
    return encoder
