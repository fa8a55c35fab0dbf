"""Draw a digit in the browser, or drop a photo of one, and see what the network makes of it.

pip install gradio && python demo.py
"""

from typing import Any

from PIL import Image

from digits import read_digits
from mnist_cnn import CHECKPOINT, HyperParameters, load_checkpoint, predict_digits

MODEL = load_checkpoint(CHECKPOINT, HyperParameters(device="cpu"))


def recognize(picture: Any) -> tuple[dict[str, float] | str, Image.Image | None]:
    """The ten probabilities, or why there are none, and the image that the network sees."""
    if isinstance(picture, dict):  # a sketch
        picture = picture["composite"]
    try:
        image = read_digits([picture or Image.new("L", (28, 28))])
    except ValueError as error:
        return str(error).removeprefix("picture 0: "), None
    probabilities = predict_digits(MODEL, image)[1][0].tolist()
    seen = Image.fromarray(image[0, 0].numpy()).resize((280, 280), Image.Resampling.NEAREST)
    return dict(zip("0123456789", probabilities, strict=True)), seen


if __name__ == "__main__":
    import gradio as gr

    with gr.Blocks(title="TinyCNN", analytics_enabled=False) as page, gr.Row():
        pen = gr.Brush(default_size=40, colors=["black"])
        sketch = gr.Sketchpad(label="Draw a digit", type="pil", brush=pen, layers=False)
        photo = gr.Image(label="or drop a photo", type="pil", sources="upload")
        outputs = [gr.Label(label="Probabilities"), gr.Image(label="What the network sees")]
        for picture in (sketch, photo):
            picture.change(recognize, picture, outputs, show_progress="hidden")
    page.launch(server_name="127.0.0.1")
