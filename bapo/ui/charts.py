"""Plotly figures from plain data; pure functions."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

# Read in light and in dark alike. A line is told from the other by its dash and its label as well.
COLOURS = {"base": "#7c8594", "dpo": "#d9730d", "bapo": "#0d9f8f"}
DASHES = {"dpo": "dash", "bapo": "solid"}
NAMES = {"base": "Base", "dpo": "DPO", "bapo": "BAPO"}
INK = "#7c8594"


def drift_figure(changes: Mapping[str, Sequence[float]], tokens: Sequence[str]) -> go.Figure:
    """The drift of the base's answer while it is written.

    `changes` maps a method to its cumulative log-prob change (nats, −drift) after each of `tokens`.
    """
    figure = go.Figure()
    figure.add_hline(y=0, line_color=INK, line_width=1.5)
    steps = list(range(1, len(tokens) + 1))
    for method, values in changes.items():
        name, colour = NAMES[method], COLOURS[method]
        figure.add_scatter(
            x=steps,
            y=list(values),
            name=name,
            mode="lines",
            line={"color": colour, "width": 3, "dash": DASHES[method]},
            customdata=[_shown(token) for token in tokens],
            hovertemplate=f"{name} %{{y:+.2f}} nats after “%{{customdata}}”<extra></extra>",
        )
        if values:
            figure.add_annotation(
                x=steps[-1],
                y=values[-1],
                text=f"<b>{name}</b> {values[-1]:+.1f}",
                font={"color": colour, "size": 14},
                showarrow=False,
                xanchor="left",
                xshift=8,
                yshift=_apart(method, changes),
            )
    figure.update_layout(
        height=260,
        margin={"l": 64, "r": 96, "t": 12, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK, "size": 13, "family": "system-ui, sans-serif"},
        showlegend=False,
        hovermode="x unified",
        uirevision="drift",  # a zoom survives the next frame
        xaxis={
            "title": {"text": "token of the base's answer", "font": {"size": 12}},
            "gridcolor": "rgba(124,133,148,.15)",
            "zeroline": False,
        },
        yaxis={
            "title": {"text": "log-prob change, nats", "font": {"size": 12}},
            "gridcolor": "rgba(124,133,148,.2)",
            "zeroline": False,
        },
    )
    # An empty or flat chart still shows its zero line in the middle, at a scale on which noise is small.
    lowest = min((min(values, default=0) for values in changes.values()), default=0)
    highest = max((max(values, default=0) for values in changes.values()), default=0)
    figure.update_yaxes(range=[min(lowest * 1.15, -1), max(highest * 1.15, 1)])
    figure.update_xaxes(range=[0, max(len(tokens), 10)])
    return figure


def _apart(method: str, changes: Mapping[str, Sequence[float]]) -> int:
    """Pixels by which a label leaves its line's end, so that labels of close lines do not overlap."""
    ends = sorted((values[-1], name) for name, values in changes.items() if values)
    span = max((max(map(abs, values), default=0) for values in changes.values()), default=0)
    if len(ends) < 2 or ends[-1][0] - ends[0][0] > 0.15 * max(span, 1):
        return 0
    return 9 if ends[-1][1] == method else -9


def _shown(token: str) -> str:
    # Plotly reads a small HTML in its texts.
    return token.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "↵")
