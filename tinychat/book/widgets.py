"""Numbers for the widgets, from the shipped tokenizer and models and from the metrics of real runs:
data for their scripts, and a table for readers without scripts.

A page asks for one with a comment, `<!-- widget: merges -->`, which Jupyter doesn't show. The
scripts lie in chapters/assets/widgets and are written by hand.
"""

import base64
import html
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tinychat.book import cache, curves

PLACE = re.compile(r"^<!-- widget: ([a-z]+) -->$", re.M)
DATA = {
    "merges": "tokenizer",
    "sampling": "distributions",
    "pixels": "network",
    "attention": "attention",
    "ppo": "runs",
}
TITLES = {
    "merges": "Try it: join pieces step by step",
    "sampling": "Try it: temperature, top-k and top-p",
    "pixels": "Try it: click the pixels",
    "attention": "Try it: where a token looks",
    "ppo": "Try it: what a run paid for its marks",
}
EXAMPLE = "The unhappiest baker"
PROMPTS = ("The cat jumped over the", "Once upon a time, there was a", "I don't like")
TEXTS = (
    "The fox ran to the river and sat on the bank. The fox was tired.",
    "Anna put her money in the bank because she wanted to keep it safe.",
)
NAMES = ("upright", "level", "cross", "ring")  # the four symbols of chapter 01
DRAWINGS = (".#..#..#.", "...###...", "#.#.#.#.#", "####.####")


def wanted(texts: Iterable[str]) -> set[str]:
    """Return the names of the widgets that the texts ask for, as prose (`# ` before it or not)."""
    found: set[str] = set()
    for text in texts:
        found.update(PLACE.findall(re.sub(r"^# ", "", text, flags=re.M)))
    return found & DATA.keys()


def make(root: Path, folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return for each widget its `data` and its `rows`, a table's header and lines.

    Kept in `folder` until the models or the code change.
    """
    makers = {
        "merges": _merges,
        "sampling": _sampling,
        "pixels": _pixels,
        "attention": _attention,
    }
    key = cache.digest(root, [Path(__file__).read_text(encoding="utf-8")])

    def made(name: str) -> dict[str, Any]:
        if name == "ppo":
            return curves.playground(root)  # read, not computed: nothing to keep
        return cache.kept(folder / f"widget-{name}.json", key, lambda: makers[name](root))

    return {name: made(name) for name in sorted(names)}


def script(name: str, data: Any) -> str:
    """Return a data script: a page opened from disk may load scripts, but no JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"tinychat.data.{DATA[name]} = {text};\n"


def expand(markdown: str, made: dict[str, dict[str, Any]], up: str = "") -> str:
    """Put the widgets where the page asks for them; `up` leads to the site's root."""
    seen: list[str] = []

    def one(match: re.Match[str]) -> str:
        name = match[1]
        if name not in made:
            raise KeyError(name)
        files = [f"data-{DATA[name]}.js", f"{name}.js"]
        files = ["common.js", *files] if not seen else files
        scripts = "" if name in seen else "".join(map(tag, files))
        seen.append(name)
        header, *rows = made[name]["rows"]
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        text = html.escape(EXAMPLE)
        box = f'<div class="widget" data-widget="{name}" data-text="{text}">{table}</div>'
        return f'<p class="widget-title">{TITLES[name]}</p>\n{box}\n{scripts}'

    def tag(file: str) -> str:
        return f'<script src="{up}assets/widgets/{file}" defer></script>'

    return PLACE.sub(one, markdown)


def _merges(root: Path) -> dict[str, Any]:
    """The shipped tokenizer's pieces in the order in which they were learned."""
    import sentencepiece

    from tinychat.data import tokenizer_model

    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(tokenizer_model())
    pieces = [model.IdToPiece(i) for i in range(model.GetPieceSize())]
    bytes_at = pieces.index("<0x00>")
    first = bytes_at + 256
    own = {piece: pieces.index(piece) for piece in ("\n", "\n\n")}
    data = {"pieces": pieces[first:], "first": first, "bytes": bytes_at, "own": own}
    rows = [["text", "its tokens"]]
    for text in (EXAMPLE, "once upon a time", "tokenization", "1984"):
        rows.append([text, " | ".join(model.EncodeAsPieces(text))])
    return {"data": data, "rows": rows}


def _sampling(root: Path) -> dict[str, Any]:
    """What the shipped base model expects after each prompt: every score, best first."""
    import torch

    from tinychat.generation import next_logits
    from tinychat.gpt import load_model
    from tinychat.runtime.checkpoint import find

    model, tokenizer, _ = load_model(find(root / "checkpoints" / "base.safetensors"))
    data, rows = [], [["the text so far", "likeliest next tokens"]]
    for prompt in PROMPTS:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt)]])
        with torch.inference_mode():
            best, order = next_logits(model, ids)[0].sort(descending=True)
        # Thousandths below the best one, as 16-bit numbers: exact enough for a picture of bars,
        # and a tenth of the size.
        below = ((best[0] - best) * 1000).round().clamp(max=65535).to(torch.int32)
        packed = b"".join(int(x).to_bytes(2, "little") for x in below)
        words = [tokenizer.piece(int(i)) for i in order[:40]]
        data.append({"text": prompt, "scores": base64.b64encode(packed).decode(), "words": words})
        shares = best.softmax(dim=0)[:5].tolist()
        pairs = zip(words, shares, strict=False)
        rows.append([prompt, ", ".join(f"{word} {share:.1%}" for word, share in pairs)])
    return {"data": data, "rows": rows}


def _attention(root: Path) -> dict[str, Any]:
    """Where the shipped base model looks, in every head, while it reads a few texts."""
    from tinychat.cli.trace import Trace, Turn
    from tinychat.gpt import load_model
    from tinychat.runtime.checkpoint import find

    model, tokenizer, _ = load_model(find(root / "checkpoints" / "base.safetensors"))
    data: list[dict[str, Any]] = []
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        trace = Trace(model, Turn(ids, [], 0, True))
        # A triangle a head, its rows end to end: the rest is zero.
        layers = [
            [
                [round(100 * x) for t, row_T in enumerate(head_TT) for x in row_T[: t + 1]]
                for head_TT in trace.attention(layer).tolist()
            ]
            for layer in range(1, trace.layers + 1)
        ]
        tokens = [tokenizer.piece(id) for id in ids]
        data.append({"text": text, "tokens": tokens, "layers": layers, "token": len(ids) - 2})
    # Begin with the head that looks away from the first token and from itself most: the others
    # show nothing at first sight.
    size = len(data[0]["tokens"])
    seen = {
        (number, i): sum(
            sum(triangle[t * (t + 1) // 2 + 1 : t * (t + 1) // 2 + t]) for t in range(2, size)
        )
        for number, heads in enumerate(data[0]["layers"])
        for i, triangle in enumerate(heads)
    }
    begin = max(seen, key=lambda place: seen[place])
    rows = [["token", f"looks most at (layer {begin[0] + 1}, head {begin[1] + 1})"]]
    triangle, tokens = data[0]["layers"][begin[0]][begin[1]], data[0]["tokens"]
    for t in range(1, size):
        row = triangle[t * (t + 1) // 2 : (t + 1) * (t + 2) // 2]
        best = max(range(t + 1), key=lambda s: row[s])
        rows.append([tokens[t], f"{tokens[best]} ({row[best]} %)"])
    return {"data": {"texts": data, "begin": begin}, "rows": rows}


def _pixels(root: Path) -> dict[str, Any]:
    """Chapter 01's network, trained on the eight clean pictures as the chapter does it."""
    import torch

    from tinychat.neural_net import MLP, train

    clean = torch.tensor([[1.0 if mark == "#" else -1.0 for mark in row] for row in DRAWINGS])
    both, labels = torch.cat((clean, -clean)), torch.arange(4).repeat(2)
    network = MLP((9, 8, 8, 4))
    train(network, itertools.repeat((both, labels), 500), rate=0.3)
    layers = [
        [
            [[round(x, 4) for x in row] for row in network.parameters[i].tolist()],
            [round(x, 4) for x in network.parameters[i + 1].tolist()],
        ]
        for i in range(0, len(network.parameters), 2)
    ]
    rows = [["picture", *NAMES]]
    for name, logits in zip(NAMES, network.forward(clean), strict=True):
        rows.append([name, *(f"{share:.1%}" for share in logits.softmax(dim=0).tolist())])
    data = {"layers": layers, "names": NAMES, "drawings": clean.int().tolist()}
    return {"data": data, "rows": rows}
