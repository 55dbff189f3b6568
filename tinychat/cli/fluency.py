"""How surprising replies are to a language model that isn't ours (needs transformers)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinychat.runtime.errors import ConfigError

if TYPE_CHECKING:
    from tinychat.data.unseen import Prompt
    from tinychat.evaluation import Answer, Interval


def perplexities(
    reader: tuple[Any, Any], asked: Sequence[Prompt], answers: Mapping[str, Sequence[Answer]]
) -> dict[str, Interval]:
    """The perplexity of each model's replies under another one, after their prompts.

    exp of the mean surprise of a token; empty replies don't count. Low is fluent, but also dull:
    a parrot of common phrases scores best.
    """
    from tinychat.evaluation import Interval, bootstrap

    tokenizer, model = reader
    found = {}
    for name, some in answers.items():
        rows = [
            _nats(tokenizer, model, prompt, answer.text)
            for prompt, answer in zip(asked, some, strict=True)
            if answer.text
        ]
        if not rows:
            raise ConfigError(f"{name} said nothing, so its fluency can't be measured.")
        nats, sizes = zip(*rows, strict=True)
        found[name] = Interval(*map(math.exp, bootstrap(nats, sizes)))
    return found


def load_reader(source: Path) -> tuple[Any, Any]:
    """A folder that transformers reads, or a .gguf file (with the packages gguf and accelerate)."""
    import os

    import torch

    os.environ.setdefault("TQDM_DISABLE", "1")  # unpacking a .gguf draws a bar of its own
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise ConfigError(
            "--fluency reads other models with transformers; install it with "
            "`pip install transformers gguf accelerate`."
        ) from None
    folder, more = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
    if not folder.is_dir():
        raise ConfigError(f"{source} is neither a folder nor a .gguf file; check the path.")
    try:
        logging.disable_progress_bar()
        local: dict[str, Any] = {"local_files_only": True, **more}
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **local)
    except (ImportError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(f"transformers can't read {source}: {first}") from None
    return tokenizer, model.eval()


def _nats(tokenizer: Any, model: Any, prompt: Prompt, text: str) -> tuple[float, int]:
    """The surprise of a reply in nats, and its tokens."""
    import torch

    if tokenizer.chat_template:
        turns = [{"role": m.role, "content": m.content} for m in prompt]
        head = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    else:
        head = "".join(f"{m.role}: {m.content}\n" for m in prompt) + "assistant:"
        text = f" {text}"
    before = tokenizer(head, add_special_tokens=False).input_ids
    said = tokenizer(text, add_special_tokens=False).input_ids
    with torch.inference_mode():
        logits_TV = model(torch.tensor([before + said])).logits[0, len(before) - 1 : -1].float()
        logprobs_T = logits_TV.log_softmax(-1).gather(1, torch.tensor(said)[:, None])
    return -float(logprobs_T.sum()), len(said)
