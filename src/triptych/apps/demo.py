"""A page to try a model in the browser: `python -m triptych.apps.demo run=DIR`.

run: a run, a preset (clip, llava/7b) or "hf:ID_OR_FOLDER". A model that writes answers questions
about a picture; one that embeds says which of several captions fits best. Options: host=127.0.0.1
(0.0.0.0 opens it to the network), port=7860, device=cpu. Needs `pip install 'triptych[demo]'`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from triptych.options import read_options, run_tool
from triptych.types import TriptychError

if TYPE_CHECKING:
    from PIL.Image import Image

    from triptych.api import Loaded

OPTIONS = ("run", "host", "port", "device")
LONGEST = 2000  # characters of a prompt


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; exit code 2 with one sentence if it cannot start."""
    return run_tool(_run, __doc__, argv)


def _run(words: Sequence[str]) -> int:
    options = _options(words)
    _gradio()
    from triptych.api import load

    try:
        page = build(load(options["run"], device=options.get("device")), options["run"])
        port = int(options.get("port", "7860"))
        serve(page, server_name=options.get("host", "127.0.0.1"), server_port=port)
    except OSError as error:  # the port is taken
        text = f"the page cannot be served ({error}); choose another port=."
        raise TriptychError(text) from error
    return 0


def build(loaded: Loaded, title: str) -> Any:
    """The page of one model, as gradio Blocks that are not served yet."""
    gr = _gradio()
    with gr.Blocks(title=f"Triptych: {title}", analytics_enabled=False) as page:
        gr.Markdown("# Triptych")
        gr.Textbox(title, label="model", interactive=False)
        with gr.Row():
            picture = gr.Image(type="pil", label="picture", sources=["upload", "clipboard"])
            with gr.Column():
                if hasattr(loaded.model, "generate"):
                    _answers(gr, loaded, picture)
                if hasattr(loaded.model, "embed_images"):
                    _captions(gr, loaded, picture)
    return page.queue(max_size=16, default_concurrency_limit=1)  # one model, one question a time


def serve(page: Any, **where: Any) -> Any:
    """Serve the page from this machine alone: no tunnel, and uploads are small."""
    return page.launch(share=False, ssr_mode=False, max_file_size="20mb", **where)


def answer(loaded: Loaded, picture: Image | None, prompt: str, length: float, beams: float) -> str:
    """What the model says; without a picture it is asked in words alone."""
    decoding = {"max_new_tokens": int(length)}
    decoding |= {"num_beams": int(beams)} if beams > 1 else {}
    return str(loaded.answer(picture, prompt[:LONGEST], **decoding))


def rank(loaded: Loaded, picture: Image, captions: str) -> dict[str, float]:
    """The cosine of each caption (one a line) to the picture; the nearest of K embeddings counts.

    Negative cosines are shown as 0, as the page draws bars.
    """
    lines = list(dict.fromkeys(line.strip() for line in captions.splitlines() if line.strip()))
    if not lines:
        raise TriptychError("write at least one caption, one a line.")
    image, texts = loaded.embed(images=[picture])[0], loaded.embed(texts=lines[:100])
    cosines = (image.view(-1, image.shape[-1]) @ texts.T).amax(0).tolist()
    return {line: max(0.0, cosine) for line, cosine in zip(lines, cosines, strict=False)}


def _answers(gr: Any, loaded: Loaded, picture: Any) -> None:
    prompt = gr.Textbox("what is in the image?", label="question")
    length = gr.Slider(1, 256, 48, step=1, label="most new tokens")
    beams = gr.Slider(1, 8, 1, step=1, label="beams")
    said = gr.Textbox(label="answer")

    def ask(image: Image | None, words: str, most: float, width: float) -> str:
        return _told(gr, lambda: answer(loaded, image, words, most, width))

    inputs = [picture, prompt, length, beams]
    gr.Button("Ask", variant="primary").click(ask, inputs, said, api_name="ask")
    prompt.submit(ask, inputs, said, api_visibility="private")


def _captions(gr: Any, loaded: Loaded, picture: Any) -> None:
    lines = gr.Textbox("a red circle\na blue square", lines=4, label="captions, one a line")
    ranked = gr.Label(label="cosine", num_top_classes=10)

    def compare(image: Image | None, words: str) -> dict[str, float]:
        if image is None:
            raise gr.Error("give a picture first.")
        return _told(gr, lambda: rank(loaded, image, words))

    gr.Button("Compare").click(compare, [picture, lines], ranked, api_name="compare")


def _told(gr: Any, run: Any) -> Any:
    """A user's mistake is shown on the page in its own sentence."""
    try:
        return run()
    except TriptychError as error:
        raise gr.Error(str(error)) from error


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise TriptychError("the demo needs gradio; pip install 'triptych[demo]'.") from None
    return gradio


def _options(words: Sequence[str]) -> dict[str, str]:
    options = read_options(words, OPTIONS)
    if "run" not in options:
        raise TriptychError("run= is missing: give a run, a preset, or hf:ID_OR_FOLDER.")
    if not options.get("port", "1").isdigit():
        raise TriptychError(f"port={options['port']} must be a number.")
    return options


if __name__ == "__main__":
    sys.exit(main())
