"""Draw what a Latent Thought Model does, by reader.

python examples/figures.py memory docs/memory.png
python examples/figures.py paper docs/paper.png
"""

from ltm_hf import cli
from ltm_hf.configuration_ltm import READERS

with cli.one_sentence():  # where it is not installed
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

INK, GREY, PAPER = "#222831", "#6b7280", "#ffffff"
FAST, FAST_LIGHT = "#d9730d", "#fdebd8"  # the latents, fitted to each text
SLOW, SLOW_LIGHT = "#2563a8", "#e1edf9"  # the weights, learned from all texts


class Drawing:
    """Boxes, arrows and words on a page of 120 x 60."""

    def __init__(self):
        self.figure = Figure(figsize=(12, 6))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, 120), ylim=(0, 60))
        self.axes.axis("off")

    def box(self, x, y, width, height, text="", edge=INK, fill=PAPER, size=10.5, line=1.2, **style):
        shape = FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=1", ec=edge, fc=fill, lw=line, **style
        )
        self.axes.add_patch(shape)
        self.text(x + width / 2, y + height / 2, text, size=size)

    def text(self, x, y, text, size=10.5, color=INK, **style):
        self.axes.text(x, y, text, **dict(ha="center", va="center", linespacing=1.35) | style, size=size, color=color)

    def arrow(self, *points, color=INK, width=1.6):
        """Along straight lines from point to point."""
        *_, before, end = points
        self.axes.plot(*zip(*points[:-1], strict=True), color=color, lw=width, solid_joinstyle="round")
        head = FancyArrowPatch(
            before, end, arrowstyle="-|>", mutation_scale=13, color=color, lw=width, shrinkA=0, shrinkB=0
        )
        self.axes.add_patch(head)

    def save(self, path):
        self.figure.savefig(path, dpi=120, pil_kwargs={"optimize": True})


# ------------------------------------------------------------------ both readers


def prompt(page):
    for row, token in enumerate(("The", "people", "of", "the", "United", "States")):
        page.box(2, 45.5 - 5 * row, 11, 3.8, token)
    page.text(7.5, 55, "prompt x", weight="bold", size=12)
    page.text(7.5, 51.9, "or training text", size=10, color=GREY)


def written(page, x):
    page.arrow((x + 16.5, 49.8), (x + 16.5, 53))
    for column, token in enumerate(("of", "America", "have")):
        page.box(x + 11.4 * column, 53.2, 10.2, 3.8, token)
    page.text(x - 1.6, 55, "text", weight="bold", size=12, ha="right")
    page.text(x + 35.4, 55.1, "…")


def inference(page, x, width, when):
    page.box(x, 17, width, 41, edge=FAST, fill=FAST_LIGHT, line=1.8)
    page.text(x + width / 2, 55, "Inference: fast, for each text", weight="bold", size=12, color=FAST)
    page.text(x + width / 2, 51.9, when, size=10, color=GREY)


def learning(page, x, width, how):
    page.box(x, 6.2, width, 8, edge=SLOW, fill=SLOW_LIGHT, line=1.8)
    page.text(x + width / 2, 12, "Learning: slow, from all texts", weight="bold", size=12, color=SLOW)
    page.text(x + width / 2, 8.7, how, size=10)


def decoder(page, x):
    page.box(x, 6.2, 41, 43.6, edge=SLOW, fill=SLOW_LIGHT, line=1.8)
    page.text(x + 20.5, 46.9, "Decoder  p(x | z),  weights β", weight="bold", size=12, color=SLOW)
    page.box(x + 4, 8, 33, 4, "token embeddings")


# ------------------------------------------------------------------ a memory


def memory():
    page = Drawing()
    prompt(page)
    decoder(page, 19)
    page.arrow((7.5, 19.6), (7.5, 10), (22.8, 10))
    page.box(23, 14.4, 33, 11.6, edge=SLOW)
    page.box(25, 15.6, 24.5, 4, "self-attention, last w tokens", size=10)
    page.box(25, 20.8, 24.5, 4, "feed-forward", size=10)
    page.text(52.8, 20.2, "L layers", color=GREY, size=10, rotation=90)
    page.box(23, 28.6, 33, 6.4, "each head looks latents up\nby addresses that it has learned", FAST, FAST_LIGHT, 10)
    page.box(23, 38.6, 33, 4.6, "probabilities of the next token")
    for start, end in ((12, 14.2), (26, 28.4), (35, 38.4)):
        page.arrow((39.5, start), (39.5, end))
    written(page, 23)

    inference(page, 67, 51, "chunk by chunk, as it reads and writes; the weights are frozen")
    page.box(73, 40.4, 39, 6.4, "error of each token: how its loss\nwould change with what it read", edge=FAST)
    page.box(73, 30.6, 39, 6, "natural-gradient step on μ and σ, in closed form", edge=FAST)
    page.box(73, 20.4, 39, 6.4, "posterior  q(z | x so far) = N(μ, σ²)\nof each head's latents z", edge=FAST)
    page.arrow((92.5, 40.4), (92.5, 36.8), color=FAST)
    page.arrow((92.5, 30.6), (92.5, 27), color=FAST)
    page.arrow((56, 41), (72.8, 41), color=FAST)
    page.arrow((73, 23.6), (63.4, 23.6), (63.4, 31.8), (56.2, 31.8), color=FAST)

    learning(page, 67, 51, "one gradient step on β: predict each token from this posterior")
    page.arrow((67, 10.2), (60.2, 10.2), color=SLOW)
    return page


# ------------------------------------------------------------------ the paper's reader


def paper():
    page = Drawing()
    prompt(page)
    page.arrow((13.8, 34), (19, 34), color=FAST)
    page.arrow((7.5, 19.6), (7.5, 3.2), (98.5, 3.2), (98.5, 6.2))
    inference(page, 19, 35, "the decoder is frozen")
    steps(page)
    learning(page, 19, 35, "one gradient step on β at fitted thoughts")
    page.arrow((54, 10.2), (77.8, 10.2), color=SLOW)
    page.text(65.5, 8.6, "β, in training only", size=10, color=SLOW)
    decoder(page, 78)
    layers(page)
    written(page, 82)
    latents(page)
    return page


def steps(page):
    page.box(27, 43.5, 24, 5.6, "posterior  q(z | x) = N(μ, σ²)", edge=FAST)
    page.box(27, 34.5, 24, 5.6, "a thought  z = μ + σ ε", edge=FAST)
    page.box(27, 23, 24, 8.1, "ELBO = log p(x | z)\n− KL(q ‖ prior)", edge=FAST)
    page.arrow((39, 43.5), (39, 40.3), color=FAST)
    page.arrow((39, 34.5), (39, 31.3), color=FAST)
    page.arrow((27, 27), (23.6, 27), (23.6, 46.3), (26.8, 46.3), color=FAST)
    page.text(22.2, 36.6, "gradient step on μ, σ", rotation=90, size=10, color=FAST)
    page.text(36.5, 19.8, "T times  (num_inference_steps)", color=FAST)


def layers(page):
    page.box(82, 14.6, 33, 4.2, "layer 1")
    page.box(82, 21.4, 33, 16.2, edge=SLOW)
    page.text(112, 35.6, "layer $ℓ$", color=GREY)
    page.box(84, 22.6, 24.5, 4, "self-attention, last w tokens", size=10)
    page.box(84, 27.5, 24.5, 4, "cross-attention to $z_ℓ$", edge=FAST, fill=FAST_LIGHT, size=10)
    page.box(84, 32.4, 24.5, 4, "feed-forward", size=10)
    page.box(82, 40.2, 33, 4.2, "layer L")
    for start, end in ((12, 14.4), (18.8, 21.2), (37.6, 40)):
        page.arrow((98.5, start), (98.5, end))
    page.arrow((112, 22.8), (112, 33.6), color=GREY)


def latents(page):
    page.box(58, 12.6, 15, 34, edge=FAST, line=1.8, fill="none", linestyle=(0, (4, 3)))
    page.text(65.5, 52, "latents z", weight="bold", size=12, color=FAST)
    page.text(65.5, 49, "a few for each layer", size=10, color=GREY)
    page.arrow((51, 46.3), (55.8, 46.3), (55.8, 36), (57.8, 36), color=FAST)
    for y, name, end in ((42.3, "L", 81.8), (29.5, "ℓ", 83.8), (16.7, "1", 81.8)):
        for column in range(3):
            page.axes.add_patch(Circle((61.3 + 2.7 * column, y), 1.0, fc=FAST, ec="none"))
        page.text(70, y, f"$z_{{{name}}}$", color=FAST, size=13)
        page.arrow((73, y), (end, y), color=FAST)
    for y in (36, 23):
        page.text(65.5, y, "⋮", color=FAST, size=14)


@cli.one_sentence()
def main():
    parser = cli.Parser(description="Draw what a Latent Thought Model does.")
    parser.add_argument("reader", choices=READERS, help="how the model reads latents")
    parser.add_argument("path", type=cli.file, help="the picture, a .png")
    args = parser.parse_args()
    if args.path.suffix != ".png":
        raise ValueError(f"The picture must be a .png, got {str(args.path)!r}.")
    {"memory": memory, "paper": paper}[args.reader]().save(args.path)


if __name__ == "__main__":
    main()
