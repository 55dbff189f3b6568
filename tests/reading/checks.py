"""What no sheet of single prompts shows: facts in unseen words, and stories inside a chat.

    python tests/reading/checks.py CKPT ... [--drafts 8] [--temperature 0.5]

Facts: questions of held-out conversations of the basics whose first answer a rule can check
(tinychat/data/facts.py), 240 of d12 and 160 of d13. Stories: the second message of a chat after
"hi" asks for a story; it is whole if it breaks no rule of chapter 11 and has at least three
sentences. A story's first lines are printed, to be read.
"""

import argparse
from dataclasses import replace

from tinychat.data import corpus
from tinychat.data.facts import Facts
from tinychat.data.onpolicy import flaw_of
from tinychat.data.preferences import digest
from tinychat.data.records import Message
from tinychat.data.split import split_of
from tinychat.evaluation import answer_all
from tinychat.generation import Sampling
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--show", type=int, default=3, help="stories to print")
    options = parser.parse_args()
    facts = Facts(corpus.basics())
    asked = {}
    for area, count in FACTS.items():
        some = [x for x in facts.asked if x.id.startswith(area) and split_of(x.id) != "train"]
        asked[area] = sorted(some, key=lambda one: digest("facts", one.id))[:count]
    for name in options.checkpoints:
        model, tokenizer, info = load_model(find(name))
        sampling = Sampling(
            temperature=options.temperature, top_p=0.95, drafts=options.drafts, max_tokens=120,
            seed=0,
        )  # fmt: skip
        print(f"{info.path} ({info.stage}), {options.drafts} drafts at {options.temperature}")
        for area, some in asked.items():
            prompts = [one.messages[:1] for one in some]
            said = answer_all(model, tokenizer, prompts, sampling)
            right = [facts.right(one, a.text) for one, a in zip(some, said, strict=True)]
            broken = [bool(flaw_of(p, a.text, a.ended)) for p, a in zip(prompts, said, strict=True)]
            print(
                f"  {area}: {sum(right) / len(right):.1%} of {len(right)} right, "
                f"{sum(broken) / len(broken):.1%} break a rule"
            )
        hello = (Message("user", "hi"),)
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
