"""Plot of a mask: the tiles that kernels visit, with the modalities along its sides."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mmkernels.ops.attention.tiles import FULL, PARTIAL, SKIP, tile_states
from mmkernels.ops.attention.types import MaskRows
from mmkernels.ops.modality import Modality

__all__ = ["plot_mask"]

_SKIP, _PARTIAL, _FULL = "#f2f2f2", "#f4a261", "#2a6f97"
_MODALITIES = ("#8d99ae", "#2a9d8f", "#e9c46a", "#9d4edd")


def plot_mask(
    path: str,
    rows: MaskRows,
    classes: tuple[Tensor, Tensor] | None,
    tile: tuple[int, int],
    title: str,
) -> None:
    """Write the plot; the path's suffix selects the format."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("AttentionMask.plot needs matplotlib: pip install 'mmkernels[plot]'") from error

    tokens_q, tokens_k = rows.lo.shape[0], rows.first_q.shape[0]
    states = tile_states(rows, tokens_k, *tile).cpu().numpy()
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        states, cmap=ListedColormap([_SKIP, _PARTIAL, _FULL]), vmin=0, vmax=2, aspect="auto", interpolation="nearest",
        extent=(0, states.shape[1] * tile[1], states.shape[0] * tile[0], 0),
    )  # fmt: skip
    axes.set(xlim=(0, max(tokens_k, 1)), ylim=(max(tokens_q, 1), 0), xlabel="key", ylabel="query")
    visited = int((states != SKIP).sum())
    axes.set_title(f"{title}: {visited} of {states.size} tiles of {tile[0]} x {tile[1]} visited", fontsize=10)
    handles = [
        Patch(color=_FULL, label=f"full ({int((states == FULL).sum())})"),
        Patch(color=_PARTIAL, label=f"partial ({int((states == PARTIAL).sum())})"),
        Patch(facecolor=_SKIP, edgecolor="#cccccc", label=f"skipped ({states.size - visited})"),
    ]
    if classes is not None:
        present = sorted(set(classes[0].unique().tolist()) | set(classes[1].unique().tolist()))
        handles += [Patch(color=_colour(c), label=_name(c)) for c in present]
        for ids, upright in ((classes[0], True), (classes[1], False)):
            _colour_bar(axes, ids.cpu().numpy(), upright)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def _colour_bar(axes: object, ids: np.ndarray, upright: bool) -> None:
    """The class of each token along the left (queries) or top (keys) side."""
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap

    assert isinstance(axes, Axes)
    cmap = ListedColormap([_colour(c) for c in range(32)])
    bounds = (-0.035, 0.0, 0.025, 1.0) if upright else (0.0, 1.01, 1.0, 0.025)
    bar = axes.inset_axes(bounds)
    bar.imshow(
        ids[:, None] if upright else ids[None, :], cmap=cmap, vmin=0, vmax=31, aspect="auto", interpolation="nearest"
    )
    bar.set_axis_off()
    if upright:
        axes.tick_params(axis="y", pad=16)
    else:
        axes.title.set_position((0.5, 1.06))
        axes.set_title(axes.get_title(), fontsize=10, pad=18)


def _colour(index: int) -> str:
    return _MODALITIES[index] if index < len(_MODALITIES) else f"C{index % 10}"


def _name(index: int) -> str:
    known = {int(m) for m in Modality}
    return Modality(index).name.lower() if index in known else f"class {index}"
