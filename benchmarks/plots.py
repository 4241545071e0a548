"""Pictures of rows: throughput and memory by batch, a step by part, operators against the floor."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Of programs, in the order in which they appear; fastmim and its backends come first.
_COLOURS = ("#1b6ca8", "#d1495b", "#8d99ae", "#edae49", "#5c946e", "#7b5ea7", "#30343f", "#c97b63")
# Of the parts of a step; one that is not named is drawn in the last colour.
_PARTS = {
    "masks": "#12355b", "embed": "#1b6ca8", "encoder": "#3d8fcc", "decoder": "#7fb8e0",
    "forward": "#3d8fcc", "teacher": "#d1495b", "loss": "#5c946e", "backward": "#c3cfd9",
    "update": "#edae49", "other": "#30343f",
}  # fmt: skip
_MARKS = {"mae": ("o", "--"), "rc_mae": ("s", "-"), "dbot": ("^", "-."), "sdae": ("D", ":")}
_NAMES = {
    "mae": "MAE", "rc_mae": "RC-MAE", "dbot": "dBOT", "sdae": "SdAE", "ibot": "iBOT", "msn": "MSN",
    "bootmae-style": "BootMAE style",
}  # fmt: skip
_OTHER = ("v", "-")
_OF_OPERATORS = ("ops", "attention", "ema")
_OURS = ("fastmim", "cuda", "triton", "cpp")
_HIGHEST = 250  # per cent of the floor that are drawn


def draw(rows: Sequence[dict], folder: Path) -> list[Path]:
    """Draw what the rows can tell.

    Args:
        rows: Of one run.
        folder: For the PNG files; it exists.

    Returns:
        The files; none if matplotlib is not installed, which is said.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed (pip install '.[bench]')")
        return []
    good = [row for row in rows if row.get("status", "ok") == "ok" and row["match"] is not False]
    trained = [row for row in good if row["suite"] in ("step", "memory")]
    pictures = {
        "throughput": (
            _by_batch("images_per_second", "images/s"),
            _with(trained, "images_per_second"),
        ),
        "memory": (_by_batch("peak_memory_gib", "peak GiB"), _with(trained, "peak_memory_gib")),
        "parts": (_by_part, _with(trained, "parts_ms")),
        "operators": (
            _operators,
            [r for r in _with(good, "percent_of_floor") if r["suite"] in _OF_OPERATORS],
        ),
    }
    written = []
    for name, (picture, of_picture) in pictures.items():
        if of_picture:
            figure = picture(of_picture)
            figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight")
            written.append(folder / f"{name}.png")
    return written


def _with(rows: Sequence[dict], field: str) -> list[dict]:
    return [row for row in rows if row.get(field) is not None]


def _figure(panels: int, size: tuple[float, float], columns: int = 2):
    """A figure of so many panels of a size, and its axes."""
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.set_visible(False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:panels]


def _groups(rows: Sequence[dict], *fields: str) -> Iterator[tuple[tuple, list[dict]]]:
    keys = dict.fromkeys(tuple(row.get(field) for field in fields) for row in rows)
    for key in keys:
        yield key, [row for row in rows if tuple(row.get(f) for f in fields) == key]


def _legend(figure, axes: Sequence, columns: int) -> None:
    """Below all panels, each program once."""
    pairs = [pair for axis in axes for pair in zip(*axis.get_legend_handles_labels(), strict=True)]
    unique = {label: handle for handle, label in pairs}
    figure.legend(
        unique.values(),
        unique,
        fontsize=7,
        frameon=False,
        ncols=columns,
        loc="outside lower center",
    )


def _colours(rows: Sequence[dict]) -> dict[str, str]:
    names = list(dict.fromkeys(row["kernel_provider"] for row in rows))
    names.sort(key=lambda name: not name.startswith(_OURS))
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def _model(name: str) -> str:
    """Of the long name what tells sizes apart."""
    return name.partition("vit_")[2].replace("_", " ") or name


def _by_batch(field: str, label: str) -> Callable:
    """A picture of a field against the batch, a panel for each model and precision."""

    def picture(rows: Sequence[dict]):
        panels = list(_groups(rows, "model", "dtype"))
        colours = _colours(rows)
        figure, axes = _figure(len(panels), (5.4, 3.8))
        for axis, ((model, dtype), of_panel) in zip(axes, panels, strict=True):
            for (method, program), line in _groups(of_panel, "method", "kernel_provider"):
                best = {row["x_value"]: row[field] for row in line}
                marker, style = _MARKS.get(method, _OTHER)
                axis.plot(
                    sorted(best), [best[x] for x in sorted(best)],
                    marker=marker, linestyle=style, color=colours[program], markersize=5,
                    label=f"{_NAMES.get(method, method)}, {program}",
                )  # fmt: skip
            _batch_axis(axis, sorted({row["x_value"] for row in of_panel}))
            axis.set(ylabel=label, title=f"{_model(model)}, {dtype}", ylim=(0, None))
            axis.grid(axis="y", alpha=0.3)
        _legend(figure, axes, columns=2 * min(2, len(panels)))
        return figure

    return picture


def _batch_axis(axis, batches: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.minorticks_off()
    axis.set_xlim(batches[0] / 1.5, batches[-1] * 1.5)
    axis.set_xlabel("images in a batch")


def _by_part(rows: Sequence[dict]):
    """Time by part of a step, stacked; the least time as a line through each bar."""
    panels = list(_groups(rows, "model", "dtype", "x_value"))
    lines = max(len(of_panel) for _, of_panel in panels)
    figure, axes = _figure(len(panels), (6.4, 1.0 + 0.32 * lines))
    for axis, ((model, dtype, batch), of_panel) in zip(axes, panels, strict=True):
        of_panel = sorted(of_panel, key=lambda row: (row["method"], row["y_value_50"]))
        _part_bars(axis, of_panel[::-1])
        axis.set(xlabel="ms", title=f"{_model(model)}, batch {batch}, {dtype}")
    shown = {part: None for row in rows for part in row["parts_ms"]}
    handles = [_patch(_PARTS.get(part, _PARTS["other"])) for part in shown]
    figure.legend(handles, shown, fontsize=8, frameon=False, ncols=5, loc="outside lower center")
    figure.suptitle("Time of a training step by part; black: least time by arithmetic", fontsize=10)
    return figure


def _part_bars(axis, rows: Sequence[dict]) -> None:
    ends = []
    for i, row in enumerate(rows):
        left = 0.0
        for part, ms in row["parts_ms"].items():
            axis.barh(i, ms, left=left, color=_PARTS.get(part, _PARTS["other"]))
            left += ms
        axis.text(left, i, f" {_short(row['y_value_50'])} ms", va="center", fontsize=7)
        if row.get("floor_ms") is not None:
            axis.plot([row["floor_ms"]] * 2, [i - 0.4, i + 0.4], color="black", linewidth=1.5)
        ends.append(left)
    names = [f"{_NAMES.get(r['method'], r['method'])}, {r['kernel_provider']}" for r in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(0, 1.12 * max(ends))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _patch(colour: str):
    from matplotlib.patches import Patch

    return Patch(color=colour)


def _operators(rows: Sequence[dict]):
    """How near operators come to their floor, a panel for each size, a bar for each program."""
    panels = list(_groups(rows, "suite", "shape", "dtype"))
    colours = _colours(rows)
    most = max(len(of_panel) for _, of_panel in panels)
    figure, axes = _figure(len(panels), (5.6, 1.0 + 0.22 * most))
    for axis, ((suite, shape, dtype), of_panel) in zip(axes, panels, strict=True):
        _operator_bars(axis, of_panel, colours)
        axis.set_ylim(max(axis.get_ylim()[0], 1.1 * most), -1)
        axis.set(xlabel="% of the floor", title=f"{suite}, {shape}, {dtype}")
        axis.axvline(100, color="black", linewidth=1)
    _legend(figure, axes, columns=4)
    figure.suptitle("Operators: share of the speed that bytes and FLOPs allow", fontsize=10)
    return figure


def _operator_bars(axis, rows: Sequence[dict], colours: dict[str, str]) -> None:
    y, places, names = 0.0, [], []
    for (name, case), of_operator in _groups(rows, "kernel_name", "case"):
        first = y
        for row in of_operator:
            percent = row["percent_of_floor"]
            program = row["kernel_provider"]
            axis.barh(y, percent, height=0.9, color=colours[program], label=program)
            end = min(percent, 0.93 * _HIGHEST)  # what is in cache passes the floor of memory
            axis.text(end, y, f" {percent:.0f}", va="center", fontsize=6)
            y += 1
        places.append((first + y - 1) / 2)
        names.append(f"{name}\n{case}" if case else name)
        y += 0.7
    axis.set_yticks(places, names, fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    highest = max(row["percent_of_floor"] for row in rows)
    axis.set_xlim(0, min(max(110, 1.1 * highest), _HIGHEST))
