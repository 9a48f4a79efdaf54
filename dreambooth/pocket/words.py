"""The byte-level BPE tokenizer of the pocket model: CLIP's format, 1,200 entries, a window of 32.

It is trained on the captions' words, on common words that a caption never uses, and on short rare strings. All three
become single entries; the last two are entries that the base model never learned, as a rare word has to be.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from dreambooth.pocket.backgrounds import CONTEXTS
from dreambooth.pocket.figures import CLASSES
from dreambooth.pocket.world import CAPTION_HEADS, COLOURS, FILLERS

WINDOW = 32
ENTRIES = 1200
START, END = "<|startoftext|>", "<|endoftext|>"
RARE = "sks zwx ohwx xjy qvz pll ucd vbk wzq hta kqn jfx yqd mfz rgv txk bnq dwp gkz lqj".split()
COMMON = """
about above after again all also an and animal apple are art as at autumn background ball bear beautiful bed behind
beside best between big black board boat book bowl box boy bridge bright building by camera can candle castle chair
chef child church clock close cloud coat cold computer cream cup dark day deep desert detailed door down dress eating
eiffel face fast field fire flower food forest from front full garden glass glasses gold good gray great hair half
hand happy has head high hill his home horse hot house house ice if is it its jungle kitchen lake lamp large leaf
leather left light like line little living long looking lost low made man many map market me milk mirror moon more
morning mountain mountains my near new no not ocean off oil old open or outfit out over painting paper park people
person plain plant playing purse rain rainbow rainy reading right river road rock round rug running sand santa scarf
sea shiny shirt shoes side silver sitting sky sleeping small smiling spring square standing star stone street style
summer sun sunglasses sunset swimming table tall that the their this three to toy tower tree trees truck two umbrella
under up van very view walking wall warm watch water wearing wet wheat window winter witch with wizard wood wooden
woman world yard young your
""".split()


def build() -> CLIPTokenizer:
    """Train the tokenizer. The library breaks ties between merges at random, so the ids differ from call to call."""
    heads = [word for head in CAPTION_HEADS for word in head.split()]
    places = [word for phrase in CONTEXTS.values() for word in phrase.split()]
    words = [*heads, *places, *CLASSES, *COLOURS, *RARE, *FILLERS, *COMMON]
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(
        [" ".join([*RARE, *FILLERS, *heads, *places, *CLASSES, *COLOURS])] * 3 + [" ".join(words)], trainer
    )
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    merges = _merges(trained)[: ENTRIES - len(symbols) - 2]
    entries = [*symbols, *dict.fromkeys(left + right for left, right in merges), START, END]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    # transformers says list[str] and hands the pairs on to tokenizers, which wants pairs
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=WINDOW)  # type: ignore[arg-type]


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def kept(folder: Path) -> CLIPTokenizer:
    """The tokenizer in ``folder``, trained and saved there if there is none: a run keeps the ids it began with."""
    if not (folder / "merges.txt").exists():
        save(build(), folder)
    return CLIPTokenizer.from_pretrained(str(folder))


def save(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the tokenizer in today's one-file form and in the published vocab.json and merges.txt."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
