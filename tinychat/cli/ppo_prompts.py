"""What `tinychat train ppo` asks: prompts to learn from, and unseen ones to be measured on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tinychat.cli.reward_exam import questions
from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.data.facts import Facts
    from tinychat.data.records import Dialogue, Message
    from tinychat.dialogue import Rendered
    from tinychat.tokenizer import Tokenizer

Item = TypeVar("Item")

HELD_OUT = 96  # prompts of the report
EVERY = 3  # one prompt in so many stands behind an earlier conversation


def find_prompts(
    data: Path | None,
    pieces: Tokenizer,
    room: int,
    longest: int,
    checked: Mapping[tuple[int, ...], Dialogue],
) -> tuple[list[list[int]], list[list[int]], dict[str, Any]]:
    """Return prompts to train on, held-out ones, and what the model card must say of them.

    None has more than `room` tokens, and none asks for more than `longest`: who wants a story and
    gets a fine for every one that doesn't end in time is taught to tell none.

    Every user turn of our dialogues with what was said before it, the prompts of the graded
    replies, as many conversations of the basics, of the questions that can be `checked` no more
    than of all these and, with a data folder, the public prompts. The held-out ones are of the
    corpus's validation part; no prompt stands on both sides.
    """
    from tinychat.data import corpus
    from tinychat.data.preferences import corpus_graded, prompt_key
    from tinychat.data.public import data_folder, source
    from tinychat.data.split import split_of
    from tinychat.data.unseen import PUBLIC_PROMPTS, prompts_of, public_prompts
    from tinychat.dialogue import render_prompt

    found: dict[str, dict[str, list[int]]] = {"train": {}, "validation": {}, "test": {}}
    unseen: set[str] = set()

    def add(part: str, messages: tuple[Message, ...], answered: bool) -> None:
        """Keep a prompt where it is `answered` in time; an unseen one is remembered in any case."""
        key = prompt_key(messages)
        if part != "train":
            unseen.add(key)
        ids = render_prompt(messages, pieces)  # whole, or not at all
        if answered and len(ids) <= room:
            found[part][key] = ids

    def fits(reply: str) -> bool:
        return len(pieces.encode(reply)) < longest  # and the token that ends it

    def add_all(part: str, dialogue: Dialogue) -> None:
        for prompt in prompts_of(dialogue):
            add(part, prompt, fits(dialogue.messages[len(prompt)].content))

    for dialogue in corpus.dialogues():
        add_all(split_of(dialogue.id), dialogue)
    talks = len(found["train"])
    for group in corpus_graded():
        # Nobody wrote a reply to most of these: what the chat model said tells how long one is.
        in_time = sum(reply.ended and fits(reply.text) for reply in group.replies)
        add(split_of(group.id), group.prompt, 2 * in_time > len(group.replies))
    sources: dict[str, Any] = {
        "dialogues": {"licence": "CC0-1.0", "prompts": talks},
        "graded": {"licence": "CC0-1.0", "prompts": len(found["train"]) - talks},
    }
    for dialogue in some_basics():
        add_all("train", dialogue)
    for ids, one in some(checked.items(), len(found["train"])):  # they are tokens already
        found["train"][prompt_key(one.messages[:1])] = list(ids)
    own = len(found["train"])
    others = sum(source["prompts"] for source in sources.values())
    sources["basics"] = {"licence": "CC0-1.0", "prompts": own - others}
    if folder := data_folder(data):
        for prompt in public_prompts(folder):
            if prompt[-1].role == "user" and split_of(prompt_key(prompt)) == "train":
                add("train", prompt, True)
        entry = source(PUBLIC_PROMPTS)
        sources[PUBLIC_PROMPTS] = {
            "licence": entry.licence,
            "attribution": entry.attribution,
            "sha256": entry.sha256,
            "prompts": len(found["train"]) - own,
        }
    train = [ids for key, ids in found["train"].items() if key not in unseen]
    held_out = list(found["validation"].values())[:HELD_OUT]
    if not train or not held_out:
        raise ConfigError(
            f"No prompt is short enough: {max(room, 0)} tokens are left for it beside the reply, "
            f"which may have {longest}; change that with --set max_tokens=32."
        )
    return train, held_out, sources


def in_chats(
    prompts: list[list[int]],
    checked: Mapping[tuple[int, ...], Dialogue],
    pieces: Tokenizer,
    room: int,
) -> tuple[list[list[int]], dict[tuple[int, ...], Dialogue]]:
    """Put every third prompt behind an earlier conversation about something else.

    Few messages of a chat are its first, and a reward that is only earned at the head of a chat is
    learned only there. What the whole has no `room` for, and what begins with a system message,
    stays as it is. Returns the prompts, and `checked` with the new ones.
    """
    from tinychat.data import corpus
    from tinychat.data.preferences import digest
    from tinychat.data.split import by_split
    from tinychat.dialogue import render

    talks = [*by_split(corpus.dialogues())["train"], *some_basics()]
    talks.sort(key=lambda one: digest("before", one.id))
    rendered = (render(one, pieces) for one in talks)
    earlier = [x.tokens for x in rendered if len(x.tokens) <= room // 2 and not x.system]
    longer, known = list(prompts), dict(checked)
    for number in range(0, len(prompts) if earlier else 0, EVERY):
        ids = prompts[number]
        whole = [*earlier[number // EVERY % len(earlier)], *ids[1:]]  # the second <|bos|> goes
        if len(whole) <= room and ids[1] != pieces.system_id:
            longer[number] = whole
            if one := checked.get(tuple(ids)):
                known[tuple(whole)] = one
    return longer, known


def written_texts(checked: Mapping[tuple[int, ...], Dialogue]) -> list[str]:
    """What was written in reply to the prompts of `find_prompts`, in about the same mixture."""
    from tinychat.data import corpus
    from tinychat.data.split import by_split

    talks = [*by_split(corpus.dialogues())["train"], *some_basics()]
    said = [turn.content for one in talks for turn in one.messages if turn.role == "assistant"]
    return said + [one.messages[1].content for one in some(checked.values(), len(said))]


def some_basics() -> list[Dialogue]:
    """Of the basics to train on, as many as there are dialogues, of every kind."""
    from tinychat.data import corpus
    from tinychat.data.split import by_split

    return some(by_split(corpus.basics())["train"], len(corpus.dialogues()))


def some(items: Iterable[Item], count: int) -> list[Item]:
    """At most `count` of the items, spread evenly over all."""
    all_of_them = list(items)
    every = max(1.0, len(all_of_them) / max(1, count))
    return [all_of_them[int(n * every)] for n in range(int(len(all_of_them) / every))]


def checked_prompts(facts: Facts, pieces: Tokenizer, room: int) -> dict[tuple[int, ...], Dialogue]:
    """The prompts whose answer a rule can check, and where each comes from."""
    return {tuple(ids): one for one, ids in questions(facts.asked, pieces, room)}


def conversations_of(pieces: Tokenizer, context: int) -> list[Rendered]:
    """All that fine-tuning reads of our own texts, so that PPO may go on reading it."""
    from tinychat.data import corpus
    from tinychat.data.split import by_split
    from tinychat.dialogue import render

    read = [*by_split(corpus.dialogues())["train"], *by_split(corpus.basics())["train"]]
    return [render(one, pieces, context=context) for one in read]


def unseen_batches(pieces: Tokenizer, context: int) -> Iterator[Any]:
    """Conversations of the validation part, to measure what storing a model costs."""
    from tinychat.data import corpus
    from tinychat.data.split import by_split
    from tinychat.dialogue import render
    from tinychat.sft import PackedConversations, SFTConfig

    config = SFTConfig(batch=4, sequence=min(512, context))
    dialogues = by_split(corpus.dialogues())["validation"][:60]
    rendered = [render(one, pieces, context=config.sequence + 1) for one in dialogues]
    return PackedConversations(rendered, config, pieces.pad_id).once()
