"""What no sheet of single prompts shows: facts in unseen words, facts and stories inside a chat.

    python tests/reading/checks.py CKPT ... [--drafts 8] [--temperature 0.5]

Facts: questions of held-out conversations of the basics whose first answer a rule can check
(tinychat/data/facts.py), 240 of d12 and 160 of d13. 120 of d12's are asked once more behind
something else: a greeting, a story, one and four other conversations, held out as well. Stories:
the second message of a chat after "hi" asks for a story; it is whole if it breaks no rule of
chapter 11 and has at least three sentences. A story's first lines are printed, to be read.
"""

import argparse
from dataclasses import replace

from panel import as_the_chat, others

from tinychat.data import corpus
from tinychat.data.facts import Facts
from tinychat.data.onpolicy import flaw_of
from tinychat.data.preferences import digest
from tinychat.data.records import Dialogue, Message
from tinychat.data.split import split_of
from tinychat.evaluation import answer_all
from tinychat.gpt import load_model
from tinychat.runtime.checkpoint import find

FACTS = {"d12": 240, "d13": 160}
SUBJECTS = (
    "fox",
    "lighthouse",
    "little boat",
    "brave mouse",
    "snowman",
    "lost kite",
    "owl",
    "king",
)
CHATS = 4  # for each subject
LATER = 120  # questions of d12 that are asked once more, later in a chat
GREETING = ("hi", "Hello! What can I do for you?")
STORY = (
    "tell me a short story about a fox",
    "Once upon a time there was a little fox named Rust. One day he found a red ball by the river. "
    "He pushed it with his nose, and it rolled to a girl. She laughed and threw it back. From then "
    "on they played every day.",
)


def chats_before(count: int) -> dict[str, list[tuple[Message, ...]]]:
    """What was said before each of `count` questions, for each kind of chat."""
    greeting, story = (
        (Message("user", said), Message("assistant", reply)) for said, reply in (GREETING, STORY)
    )
    return {
        "a greeting": [greeting] * count,
        "a story": [story] * count,
        "one other": others(count, 1),
        "four others": others(count, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--show", type=int, default=3, help="stories to print")
    options = parser.parse_args()
    facts = Facts(corpus.basics())
    rounds: dict[str, list[tuple[tuple[Message, ...], Dialogue]]] = {}
    for area, count in FACTS.items():
        some = [x for x in facts.asked if x.id.startswith(area) and split_of(x.id) != "train"]
        some.sort(key=lambda one: digest("facts", one.id))
        rounds[area] = [((), one) for one in some[:count]]
    later = [one for _, one in rounds["d12"][:LATER]]
    for what, chats in chats_before(LATER).items():
        rounds[f"d12 behind {what}"] = list(zip(chats, later, strict=True))
    for name in options.checkpoints:
        model, tokenizer, info = load_model(find(name))
        sampling = as_the_chat(options.drafts, options.temperature)
        print(f"{info.path} ({info.stage}), {options.drafts} drafts at {options.temperature}")
        for what, chats in rounds.items():
            prompts = [(*before, one.messages[0]) for before, one in chats]
            said = answer_all(model, tokenizer, prompts, sampling)
            right = [facts.right(one, a.text) for (_, one), a in zip(chats, said, strict=True)]
            broken = [bool(flaw_of(p, a.text, a.ended)) for p, a in zip(prompts, said, strict=True)]
            print(
                f"  {what}: {sum(right) / len(right):.1%} of {len(right)} right, "
                f"{sum(broken) / len(broken):.1%} break a rule"
            )
        hello = (Message("user", GREETING[0]),)
        long = replace(sampling, max_tokens=240)
        greetings = [
            answer_all(model, tokenizer, [hello], replace(sampling, seed=n))[0].text
            for n in range(CHATS)
        ]
        chats = [
            (
                *hello,
                Message("assistant", hi),
                Message("user", f"tell me a short story about a {x}"),
            )
            for x in SUBJECTS
            for hi in greetings
        ]
        stories = answer_all(model, tokenizer, chats, long)
        flaws = [flaw_of(c, a.text, a.ended) for c, a in zip(chats, stories, strict=True)]
        whole = [
            not flaw and sum(a.text.count(mark) for mark in ".!?") >= 3
            for flaw, a in zip(flaws, stories, strict=True)
        ]
        print(f"  stories inside a chat: {sum(whole)} of {len(whole)} whole")
        for number in range(0, len(chats), max(1, len(chats) // max(1, options.show))):
            print(f"    [{flaws[number] or 'whole'}] {stories[number].text[:300]}")


if __name__ == "__main__":
    main()
