"""Draw a digit in the browser, or drop a photo of one, and see how it is read.

pip install gradio && python demo.py
"""

from typing import Any

from PIL import Image

from mnist_cnn import CHECKPOINT, HyperParameters, load_model
from predict import predict_digits, read_digit

MODEL = load_model(CHECKPOINT, HyperParameters(device="cpu"))


def recognize(picture: Any) -> tuple[dict[str, float] | str, Image.Image | None]:
    """The ten probabilities, or why there are none, and what the network sees."""
    if isinstance(picture, dict):  # a drawing
        picture = picture["composite"]
    if picture is None:
        return "", None
    try:
        image = read_digit(picture)
    except ValueError as error:
        return str(error), None
    _, (probabilities,) = predict_digits(MODEL, [picture])
    seen = Image.fromarray(image[0].numpy())
    large = seen.resize((280, 280), Image.Resampling.NEAREST)
    return dict(zip("0123456789", probabilities.tolist(), strict=True)), large


if __name__ == "__main__":
    import gradio as gr

    with gr.Blocks(title="TinyCNN", analytics_enabled=False) as page, gr.Row():
        pen = gr.Brush(default_size=40, colors=["black"])
        sketch = gr.Sketchpad(label="Draw a digit", type="pil", brush=pen, layers=False)
        photo = gr.Image(label="or drop a photo", type="pil", sources="upload")
        answer = gr.Label(label="Probabilities")
        seen = gr.Image(label="What the network sees")
        for picture in (sketch, photo):
            picture.change(recognize, picture, [answer, seen], show_progress="hidden")
    page.launch(server_name="127.0.0.1")
