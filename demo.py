"""Draw digits in the browser, or drop a photo, and see how they are read.

pip install "gradio>=6.10" && python demo.py
"""

import os
import sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from torchvision.utils import make_grid

from mnist_cnn import CHECKPOINT, infer, load_model
from predict import read_page

MODEL = load_model(Path(__file__).with_name(CHECKPOINT), device="cpu")
# Gradio stores uploaded files there. Its API accepts any path; we read no other file.
UPLOADS = TemporaryDirectory()
os.environ["GRADIO_TEMP_DIR"] = UPLOADS.name

# A canvas of our own: the brush of gr.Sketchpad (Gradio 6.31) must be chosen before it
# draws, and again after each time the pad is cleared.
PAD = """
<canvas width="800" height="800" style="width: 100%; background: white;
  border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
  cursor: crosshair; touch-action: none"></canvas>
<button style="width: 100%; margin-top: 0.5em; padding: 0.5em;
  border-radius: var(--radius-lg); background: var(--button-secondary-background-fill)"
  >Clear</button>
"""
PAD_SCRIPT = """
const canvas = element.querySelector("canvas");
const pen = canvas.getContext("2d");
pen.lineWidth = 56;
pen.lineCap = pen.lineJoin = "round";

const send = (drawing) => {
  props.value = drawing;
  trigger("input");
};
const draw = (x, y) => {
  const scale = canvas.width / canvas.clientWidth;
  pen.lineTo(x * scale, y * scale);
  pen.stroke();
};
const clear = () => pen.clearRect(0, 0, canvas.width, canvas.height);

canvas.onpointerdown = (event) => {
  canvas.setPointerCapture(event.pointerId);  // a stroke may leave the pad
  pen.beginPath();
  draw(event.offsetX, event.offsetY);
  draw(event.offsetX + 0.5, event.offsetY);  // Chromium draws no line of length zero
};
canvas.onpointermove = (event) => {
  if (event.buttons) draw(event.offsetX, event.offsetY);
};
canvas.onpointerup = () => send(canvas.toDataURL().split(",")[1]);
element.querySelector("button").onclick = () => {
  clear();
  send(null);
};
watch("value", () => props.value || clear());  // a photo takes the drawing's place
"""
# The value is the list of probabilities, or a text.
ANSWER = """
<div style="min-height: 300px">
  <h2>${Array.isArray(value) ? value.indexOf(Math.max(...value)) : value}</h2>
  {{#each value}}
  <div style="display: flex; gap: 0.7em; align-items: center; line-height: 1.7">
    {{@index}}
    <div style="flex: 1; height: 0.8em; background: var(--border-color-primary)">
      <div style="width: calc(100% * {{this}}); height: 100%;
        background: var(--color-accent)"></div>
    </div>
    <span style="width: 3.5em; text-align: right">${(100 * {{this}}).toFixed(1)}%</span>
  </div>
  {{/each}}
</div>
"""


def recognize(picture: Any) -> tuple[list[float] | str, np.ndarray | None]:
    """The probabilities of a single digit, or else a text; and what the network sees.

    The picture is a drawing, as a PNG file in base64, or an uploaded file, or None.
    """
    if picture is None:
        return "", None
    try:
        if isinstance(picture, str):
            picture = Image.open(BytesIO(b64decode(picture)))
        else:
            picture = Path(picture["path"]).resolve()
            if not picture.is_relative_to(Path(UPLOADS.name).resolve()):
                raise OSError("not an uploaded file")
        images, _ = read_page(picture)
    except OSError:
        return "This file cannot be read. Export it as a JPEG or PNG.", None
    except ValueError as error:
        return f"{error}.".capitalize(), None
    seen = make_grid(images, nrow=4)[0].numpy().repeat(10, 0).repeat(10, 1)
    probabilities = infer(MODEL, images).softmax(1)
    if len(images) == 1:
        return probabilities[0].tolist(), seen
    best = [f"{each.argmax()} ({each.max():.0%})" for each in probabilities]
    return ", ".join(best), seen


if __name__ == "__main__":
    try:
        import gradio as gr
    except ImportError:
        sys.exit(f'Install Gradio: {sys.executable} -m pip install "gradio>=6.10"')

    stroke = 255 * np.eye(100, dtype=np.uint8)
    infer(MODEL, read_page(stroke)[0])  # the first time takes seconds
    with gr.Blocks(title="TinyCNN", analytics_enabled=False) as page:
        gr.Markdown(
            "# TinyCNN\n"
            "Draw digits, or drop a photo, and see how a tiny network reads them."
        )
        with gr.Row():
            with gr.Column():  # or else it shrinks to nothing on many phones
                pad = gr.HTML(html_template=PAD, js_on_load=PAD_SCRIPT)
            with gr.Column():
                with gr.Row():
                    with gr.Column(min_width=200):
                        answer = gr.HTML(html_template=ANSWER, container=True)
                    with gr.Column(min_width=200):
                        gr.Markdown("What the network sees")
                        seen = gr.Image(
                            show_label=False, format="png", height=300, buttons=[]
                        )
                photo = gr.Image(
                    label="or drop a photo", sources="upload", height=240, buttons=[]
                )
        for source, other in (pad, photo), (photo, pad):
            source.input(
                recognize,
                source,
                [answer, seen],
                preprocess=False,  # Gradio itself would fail on what is no picture
                trigger_mode="always_last",  # a stroke may end while one is being read
                show_progress="hidden",
            )
            source.input(None, None, other, js="() => null")
    page.launch(footer_links=[])
