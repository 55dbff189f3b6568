"""The text that the shipped tokenizer was trained on: a balanced sample, simple text first."""

import random
from collections.abc import Iterator
from pathlib import Path

from tinychat.data import corpus
from tinychat.data.public import read_dialogues, read_documents, source
from tinychat.data.split import split_of

# source: (most characters of it, times over)
SAMPLE: dict[str, tuple[int, int]] = {
    "children_classics": (5_000_000, 1),
    "childrens_storybooks_ccby": (9_000_000, 2),
    "tinystories_sample": (9_000_000, 1),
    "onestop_english": (9_000_000, 1),
    "self_dialogue": (3_000_000, 1),
    "topical_chat": (2_000_000, 1),
    "synthetic_persona_chat": (1_000_000, 1),
    "chitchat_byu_clean": (1_000_000, 1),
    "dolly_6k": (2_000_000, 1),
    "wikipedia_en_selected": (8_000_000, 1),
    "classic_fiction": (6_000_000, 1),
}
OWN_TIMES = 3


def tokenizer_texts(folder: Path | None) -> Iterator[str]:
    """Yield training texts for a tokenizer: the corpus but its basics three times, then SAMPLE.

    Only training parts, so that bits per byte on the validation parts stay honest. Without a
    folder the embedded corpus alone. Raises DataError for a source that the folder lacks.
    """
    own = [
        content
        for dialogue in corpus.dialogues()
        if split_of(dialogue.id) == "train"
        for content in (
            *(message.content for message in dialogue.messages),
            *(reply.content for reply in dialogue.rejected),
        )
    ]
    own += [
        document.text
        for document in corpus.stories() + corpus.explanations()
        if split_of(document.id) == "train"
    ]
    for _ in range(OWN_TIMES):
        yield from own
    if folder is None:
        return
    for name, (most, times) in SAMPLE.items():
        for _ in range(times):
            yield from _some(name, folder, most)


def _some(name: str, folder: Path, most: int) -> Iterator[str]:
    if source(name).kind == "pretrain":
        documents = read_documents(name, folder)
        records = [[d.text] for d in documents if split_of(d.id) == "train"]
    else:
        dialogues = read_dialogues(name, folder)
        records = [
            [message.content for message in d.messages]
            for d in dialogues
            if split_of(d.id) == "train"
        ]
    random.Random(1).shuffle(records)
    characters = 0
    for texts in records:
        if characters > most:
            return
        characters += sum(map(len, texts))
        yield from texts
