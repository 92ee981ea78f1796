"""Draws idea.svg beside it: what is frozen, trained and stored; how far backpropagation goes."""

from pathlib import Path

BLUE, ORANGE, RED, INK = "#d3e6f8", "#f8bd7f", "#c8102e", "#1f2933"
COLUMNS = [  # title, its cost in the paper, trained layers, y of the cut, y where frozen layers begin
    ("full", "90.2 M trained, 2.98 h", 12, 582, 0),
    ("last 3 layers", "26.4 M trained, 2.52 h", 3, 582, 249),
    ("last 3, from a cache", "21.3 M trained, 1.02 h*", 3, 269, 0),
    ("LoRA", "0.3 M trained, 2.48 h", 0, 516, 173),
]
NOTES = """All but the CNN is trained:/nothing frozen is crossed.
What lies before the frozen/layers is trained, too. To reach/it, all nine are crossed.
What is faded runs once and is/read from disk. --freeze-prefix/has the same cut and no disk.
Small A and B beside each layer:/few weights are trained, yet all/twelve layers are crossed."""
SNOW = "M0 -7V7M-6 -3.5L6 3.5M-6 3.5L6 -3.5M-2 -6L0 -4L2 -6M-2 6L0 4L2 6"
FLAME = "M0 -8C1 -4 6 -3 5 3C4 8 -4 8 -5 3C-5 0 -3 -1 -3 -4C-1 -3 1 -4 0 -8Z"


def text(x, y, words, size=17, more=f'fill="{INK}"'):
    """Centred at x; a slash begins a new line."""
    lines = [f'<tspan x="{x}" dy="{1.2 * size}">{line}</tspan>' for line in words.split("/")]
    return f'<text y="{y - 1.2 * size}" font-size="{size}" {more}>{"".join(lines)}</text>'


def path(shape, color=INK, width=2.0, fill="none", more=""):
    return f'<path d="{shape}" stroke="{color}" stroke-width="{width}" fill="{fill}" {more}/>'


def arrow(x, y, end, color=INK, width=2):
    neck = end - 3 * width if end > y else end + 3 * width
    head = path(f"M{x - 2 * width} {neck}H{x + 2 * width}L{x} {end}Z", color, 0, color)
    return path(f"M{x} {y}V{neck}", color, width) + head


def box(x, y, height, words, frozen, width=200):
    shape, middle = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="5"', y + height / 2
    where = f'transform="translate({x + 17} {middle})"'
    look = (SNOW, "#1f6fb5", 1.5, "none") if frozen else (FLAME, INK, 0, "#d9480f")
    rect = f'<rect {shape} stroke="{INK}" fill="{BLUE if frozen else ORANGE}"/>'
    label = text(x + width / 2 + 8, middle + 5 - 9 * words.count("/"), words, 15)
    return rect + path(*look, where) + label


def disk(x, y):
    body = path(f"M{x - 36} {y - 7}v14a36 6 0 0 0 72 0v-14", INK, 1.5, "#cddba6")
    return body + path(f"M{x - 36} {y - 7}a36 6 0 0 0 72 0a36 6 0 0 0 -72 0Z", INK, 1.5, "#e6efcb")


def column(x, title, cost, trained, cut, crossed):
    """One way to finetune: its name, the stack that speech goes up, and backpropagation down."""
    lower = [text(x + 100, 660, "speech"), box(x, 594, 30, "CNN", True)]
    lower += [arrow(x + 100, *ends) for ends in ((643, 627), (592, 573), (526, 507))]
    lower += [box(x, 526, 44, "projection, positional/conv., LayerNorm", cut < 582)]
    upper = [text(x + 100, 48, title, 22, 'font-weight="bold"'), text(x + 100, 78, cost)]
    upper += [text(x + 100, 118, "CCC loss"), box(x, 144, 26, "pooling, head", False)]
    upper += [arrow(x + 100, *ends) for ends in ((142, 126), (289, 248))]
    for layer in range(1, 13):
        part, y = (lower, 507 - 24 * layer) if layer < 10 else (upper, 464 - 24 * layer)
        part.append(box(x, y, 21, f"layer {layer}", layer <= 12 - trained))
        if not trained:  # LoRA's adapters
            part.append(f'<rect x="{x + 158}" y="{y + 2}" width="38" height="17" fill="{ORANGE}"/>')
            part.append(text(x + 177, y + 15.5, "A B", 13))
    yield f'<g opacity="{0.4 if cut < 500 else 1}">{"".join(lower)}</g>' + "".join(upper)
    yield path(f"M{x - 14} {cut}H{x + 240}", more='stroke-dasharray="7 5"')
    yield disk(x + 100, cut) if cut < 500 else ""
    yield path(f"M{x + 146} 112H{x + 222}V{crossed or 120}", width=4)
    yield arrow(x + 222, crossed or 118, cut - 2, RED if crossed else INK, 4)
    if crossed:
        where = f'fill="{RED}" font-weight="bold" transform="rotate(90 {x + 238} 380)"'
        yield text(x + 238, 380, f"crosses {12 - trained} frozen layers", 15, where)


def draw():
    """The picture; its own panel makes it legible on a light and on a dark page."""
    yield '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1180 840" text-anchor="middle" '
    yield 'font-family="sans-serif"><rect width="1180" height="840" rx="14" fill="#fbfcfe"/>'
    for number, (values, note) in enumerate(zip(COLUMNS, NOTES.split("\n"), strict=True)):
        yield from column(44 + 284 * number, *values)
        yield text(152 + 284 * number, 694, note)
    yield box(44, 770, 26, "frozen", True, 110) + box(170, 770, 26, "trained", False, 110)
    yield disk(346, 783) + text(456, 788, "stored on disk") + path("M544 783H584", width=4)
    yield text(668, 788, "backpropagation") + text(966, 788, "cut: no gradient below this line")
    yield path("M776 783H816", more='stroke-dasharray="7 5"')
    hours = "hours: the paper's, 5 epochs in fp32 on an A40 (*on an RTX 2080 Ti)"
    yield text(590, 822, hours, 15) + "</svg>\n"


if __name__ == "__main__":
    Path(__file__).with_name("idea.svg").write_text("".join(draw()), encoding="utf-8")
