"""The curves of a training, from plain data; pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from bapo.ui.charts import COLOURS, INK, NAMES

Points = Sequence[tuple[int, Mapping[str, float]]]  # (step, metric → value)
Metrics = Mapping[str, Mapping[str, Points]]  # method → split → points


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture: which metrics it shows, how each is drawn, and what its axis counts."""

    title: str
    axis: str
    lines: Mapping[str, tuple[str, str]]  # metric → (its name, its dash)


CHARTS = (
    Chart("The base's own answer", "log-prob change, nats", {"logps_change/base": ("base response", "solid")}),
    Chart(
        "The taste",
        "log-prob change, nats",
        {"logps_change/chosen": ("chosen", "solid"), "logps_change/rejected": ("rejected", "dot")},
    ),
    Chart(
        "Reward accuracy and margin",
        "share of pairs · β nats",
        {"rewards/accuracies": ("accuracy", "solid"), "rewards/margins": ("margin", "dot")},
    ),
    Chart(
        "Loss and its two terms",
        "loss",
        {"loss": ("loss", "solid"), "loss/preference": ("preference", "dot"), "loss/anchor": ("anchor, nats", "dash")},
    ),
)


def training_figure(chart: Chart, metrics: Metrics) -> go.Figure:
    """One line for each method and metric; held-out figures are the same line with markers."""
    figure = go.Figure()
    figure.add_hline(y=0, line_color=INK, line_width=1)
    for method, splits in metrics.items():
        for split, points in splits.items():
            for metric, (name, dash) in chart.lines.items():
                shown = [(step, values[metric]) for step, values in points if metric in values]
                if not shown or (method == "dpo" and metric.startswith("loss/")):  # DPO's loss has one term
                    continue
                held_out = split == "held out"
                label = f"{NAMES[method]} {name}" + (" (held out)" if held_out else "")
                figure.add_scatter(
                    x=[step for step, _ in shown],
                    y=[value for _, value in shown],
                    name=label,
                    mode="lines+markers" if held_out else "lines",
                    marker={"size": 7, "symbol": "circle" if method == "bapo" else "diamond"},
                    line={"color": COLOURS[method], "width": 1.5 if held_out else 2.5, "dash": dash},
                    opacity=1.0 if held_out else 0.75,
                    hovertemplate=f"{label} %{{y:.3g}} at step %{{x}}<extra></extra>",
                )
    figure.update_layout(
        title={"text": chart.title, "font": {"size": 14}, "x": 0, "xanchor": "left", "xref": "paper"},
        height=280,
        margin={"l": 60, "r": 12, "t": 36, "b": 76},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK, "size": 12, "family": "system-ui, sans-serif"},
        legend={"orientation": "h", "y": -0.28, "font": {"size": 11}},
        uirevision="training",
        xaxis={"title": {"text": "step", "standoff": 4}, "gridcolor": "rgba(124,133,148,.15)", "zeroline": False},
        yaxis={"title": {"text": chart.axis}, "gridcolor": "rgba(124,133,148,.2)", "zeroline": False},
    )
    return figure
