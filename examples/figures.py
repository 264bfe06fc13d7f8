"""Draw the architecture for the README.

python examples/figures.py docs/architecture.png
"""

from ltm_hf import cli

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


def prompt(page):
    for row, token in enumerate(("The", "people", "of", "the", "United", "States")):
        page.box(2, 45.5 - 5 * row, 11, 3.8, token)
    page.text(7.5, 55, "prompt x", weight="bold", size=12)
    page.text(7.5, 51.9, "or training text", size=10, color=GREY)
    page.arrow((13.8, 34), (19, 34), color=FAST)
    page.arrow((7.5, 19.6), (7.5, 3.2), (98.5, 3.2), (98.5, 6.2))


def inference(page):
    page.box(19, 17, 35, 41, edge=FAST, fill=FAST_LIGHT, line=1.8)
    page.text(36.5, 55, "Inference: fast, for each text", weight="bold", size=12, color=FAST)
    page.text(36.5, 51.9, "the decoder is frozen", size=10, color=GREY)
    page.box(27, 43.5, 24, 5.6, "posterior  q(z | x) = N(μ, σ²)", edge=FAST)
    page.box(27, 34.5, 24, 5.6, "a thought  z = μ + σ ε", edge=FAST)
    page.box(27, 23, 24, 8.1, "ELBO = log p(x | z)\n− KL(q ‖ prior)", edge=FAST)
    page.arrow((39, 43.5), (39, 40.3), color=FAST)
    page.arrow((39, 34.5), (39, 31.3), color=FAST)
    page.arrow((27, 27), (23.6, 27), (23.6, 46.3), (26.8, 46.3), color=FAST)
    page.text(22.2, 36.6, "gradient step on μ, σ", rotation=90, size=10, color=FAST)
    page.text(36.5, 19.8, "T times  (num_inference_steps)", color=FAST)


def learning(page):
    page.box(19, 6.2, 35, 8, edge=SLOW, fill=SLOW_LIGHT, line=1.8)
    page.text(36.5, 12, "Learning: slow, from all texts", weight="bold", size=12, color=SLOW)
    page.text(36.5, 8.7, "one gradient step on β at fitted thoughts", size=10)
    page.arrow((54, 10.2), (77.8, 10.2), color=SLOW)
    page.text(65.5, 8.6, "β, in training only", size=10, color=SLOW)


def decoder(page):
    page.box(78, 6.2, 41, 43.6, edge=SLOW, fill=SLOW_LIGHT, line=1.8)
    page.text(98.5, 46.9, "Decoder  p(x | z),  weights β", weight="bold", size=12, color=SLOW)
    page.box(82, 8, 33, 4, "token embeddings")
    page.box(82, 14.6, 33, 4.2, "layer 1")
    page.box(82, 21.4, 33, 16.2, edge=SLOW)
    page.text(112, 35.6, "layer $ℓ$", color=GREY)
    page.box(84, 22.6, 24.5, 4, "self-attention, last w tokens", size=10)
    page.box(84, 27.5, 24.5, 4, "cross-attention to $z_ℓ$, gated", edge=FAST, fill=FAST_LIGHT, size=10)
    page.box(84, 32.4, 24.5, 4, "feed-forward", size=10)
    page.box(82, 40.2, 33, 4.2, "layer L")
    for start, end in ((12, 14.4), (18.8, 21.2), (37.6, 40)):
        page.arrow((98.5, start), (98.5, end))
    page.arrow((112, 22.8), (112, 33.6), color=GREY)
    page.arrow((98.5, 49.8), (98.5, 53))
    for column, token in enumerate(("of", "America", "have")):
        page.box(82 + 11.4 * column, 53.2, 10.2, 3.8, token)
    page.text(80.4, 55, "text", weight="bold", size=12, ha="right")
    page.text(117.4, 55.1, "…")


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
    parser = cli.Parser(description="Draw the architecture.")
    parser.add_argument("path", type=cli.file, help="the picture, a .png")
    path = parser.parse_args().path
    if path.suffix != ".png":
        raise ValueError(f"The picture must be a .png, got {str(path)!r}.")
    page = Drawing()
    for part in (prompt, inference, learning, decoder, latents):
        part(page)
    page.save(path)


if __name__ == "__main__":
    main()
