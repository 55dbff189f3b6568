"""Print a chat model's replies to a list of prompts, for reading.

    python tests/reading/read.py CKPT [--seed 0] [--temperature 0.5] [--drafts 8] [--prompts FILE]

A person judges them; the verdicts go into chapters/lab_notes.md. prompts.txt holds what no
training text may ask; strangers, newcomers and visitors are by three people who knew neither
texts nor model. Prompts that a training conversation opens with, word for word, are marked.
"""

import argparse
from pathlib import Path

from panel import as_the_chat

from tinychat.data import corpus
from tinychat.data.records import Message
from tinychat.dialogue import render_prompt
from tinychat.generation import stop_ids, stream
from tinychat.gpt import load_model
from tinychat.runtime.checkpoint import find


def plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum() or letter == " ").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--drafts", type=int, default=8)
    parser.add_argument("--prompts", type=Path, default=Path(__file__).with_name("prompts.txt"))
    options = parser.parse_args()
    model, tokenizer, info = load_model(find(options.checkpoint))
    training = [*corpus.dialogues(), *corpus.basics()]
    known = {plain(dialogue.messages[0].content) for dialogue in training}
    sampling = as_the_chat(options.drafts, options.temperature, options.seed)
    print(
        f"{info.path} ({info.stage}), temperature {options.temperature}, "
        f"{options.drafts} drafts, seed {options.seed}\n"
    )
    prompts = options.prompts.read_text(encoding="utf-8").splitlines()
    for number, prompt in enumerate(prompts, 1):
        ids = render_prompt(
            [Message("user", prompt)], tokenizer, context=model.config.context, reserve=120
        )
        reply = "".join(stream(model, tokenizer, ids, sampling, stop=stop_ids(tokenizer)))
        seen = " (opens a conversation of the corpus)" if plain(prompt) in known else ""
        print(f"{number}. **{prompt}**{seen}\n   {' / '.join(reply.split(chr(10)))}")


if __name__ == "__main__":
    main()
