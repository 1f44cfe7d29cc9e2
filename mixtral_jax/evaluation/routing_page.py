"""Stretches of text, token by token, with the experts that each was sent to, and a page of them in colours.

The page is one HTML file that opens without a network.
"""

import colorsys
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

from mixtral_jax.data.splits import Documents
from mixtral_jax.evaluation.scoring import Route
from mixtral_jax.evaluation.windows import Window, batch_of

Decode = Callable[[np.ndarray], str]

SAMPLE_TOKENS = 400  # of each source, on the page of coloured text
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Tokens by expert</title>
<style>
body {{ font: 15px/1.7 ui-monospace, monospace; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #111;
  background: #fff }}
header {{ position: sticky; top: 0; background: #fff; padding: .5em 0; font-family: sans-serif }}
section {{ white-space: pre-wrap; overflow-wrap: anywhere }}
h2 {{ font: bold 1.1em sans-serif }}
span.t {{ border-radius: 2px }}
span.key {{ padding: 0 .5em; margin-right: .3em; border-radius: 3px }}
</style>
<header>
<label>layer <input id="layer" type="range" min="0" max="{last_layer}" value="0"> <output id="shown"></output></label>
<label>choice <select id="choice">{choices}</select></label>
<div>{keys}</div>
</header>
{sections}
<script>
const colours = {colours}, routes = {routes};
const layer = document.getElementById("layer"), choice = document.getElementById("choice");
function paint() {{
  document.getElementById("shown").value = layer.value;
  document.querySelectorAll("section").forEach((section, s) => section.querySelectorAll("span").forEach((span, t) => {{
    const experts = routes[s][t][layer.value];
    span.style.background = colours[experts[choice.value]];
    span.title = "expert " + experts.join(", ");
  }}));
}}
layer.oninput = choice.onchange = paint;
paint();
</script>
</html>
"""


@dataclass(frozen=True)
class RoutedText:
    """A stretch of text and where each of its tokens went."""

    name: str
    pieces: list[str]  # text of each token; together they are the text
    experts: Integer[np.ndarray, "tokens layers k"]


def route_sample(route: Route, documents: Documents, decode: Decode, length: int) -> RoutedText:
    """Routes the begin of a source's first document that is long enough, or of its longest.

    Args:
        route: see `Route`.
        documents: the source.
        decode: turns tokens into text.
        length: tokens of the row; of them at most `SAMPLE_TOKENS` are shown.
    """
    sizes = [len(documents.tokens(index)) for index in range(min(documents.num_documents, 1000))]
    wanted = min(length, SAMPLE_TOKENS)
    index = next((i for i, size in enumerate(sizes) if size >= wanted), int(np.argmax(sizes)))
    tokens = documents.tokens(index)[:wanted]
    batch = batch_of([[Window(index, tokens, np.zeros(len(tokens), bool), len(tokens))]], 1, length)
    return RoutedText(documents.name, decode_pieces(decode, tokens), route(batch).experts[0, : len(tokens)])


def decode_pieces(decode: Decode, tokens: Integer[np.ndarray, " tokens"]) -> list[str]:
    """Gives each token its part of the decoded text; the last token of a character of several gets all of it."""
    pieces, written = [], 0
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        part = text[written:]
        if part.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):  # a character that is not yet whole
            part = ""
        pieces.append(part)
        written += len(part)
    return pieces


def expert_colour(expert: int, num_experts: int) -> str:
    """Chooses a light colour, dark text being readable on it; neighbours differ much."""
    hue = expert / num_experts
    lightness = 0.72 if expert % 2 else 0.8
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.75)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def routing_page(texts: Sequence[RoutedText], num_experts: int) -> str:
    """Writes the page: a text for each source, the layer and the choice to be picked by hand.

    Args:
        texts: at least one, all of one model.
        num_experts: of every layer.
    """
    _, layers, k = texts[0].experts.shape
    names = ["first", "second", *[f"{n}." for n in range(3, k + 1)]][:k]
    colours = [expert_colour(expert, num_experts) for expert in range(num_experts)]
    sections = "\n".join(
        f"<h2>{html.escape(text.name)}</h2>\n<section>"
        + "".join(f'<span class="t">{html.escape(piece)}</span>' for piece in text.pieces)
        + "</section>"
        for text in texts
    )
    return PAGE.format(
        last_layer=layers - 1,
        choices="".join(f'<option value="{n}">{name}</option>' for n, name in enumerate(names)),
        keys="".join(f'<span class="key" style="background: {c}">{n}</span>' for n, c in enumerate(colours)),
        sections=sections,
        colours=json.dumps(colours),
        routes=json.dumps([text.experts.tolist() for text in texts], separators=(",", ":")),
    )
