"""A live page over the reports of an output folder.

python -m streamlit run deployments/dashboard/app.py -- OUTPUT_DIR/reports
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import streamlit as st

from deployments.dashboard.with_duckdb import ask, connect, rows
from flows.console.formats import format_size

REFRESH_S = 10
TITLES = {
    "failed": "What failed, and why",
    "slower": "What got slower since last week",
    "less_accurate": "What got less accurate since last week",
    "never_met": "What never met its contract",
}
SIZE, SPEEDUP, ACCURACY, MOMENT = "bytes", "%.2fx", "%.4g", "YYYY-MM-DD HH:mm"
COLUMNS = {  # of a table -> its heading, in the words of report.html, and how its values are shown
    "model": st.column_config.TextColumn("model", pinned=True),
    "output": st.column_config.TextColumn("file"),
    "outcome": st.column_config.TextColumn("outcome"),
    "verdict": st.column_config.TextColumn("verdict"),
    "reason": st.column_config.TextColumn("why", width="large"),
    "stage": st.column_config.TextColumn("failed in"),
    "error": st.column_config.TextColumn("error", width="large"),
    "hint": st.column_config.TextColumn("hint", width="large"),
    "failed_since": st.column_config.DatetimeColumn("failed since", format=MOMENT),
    "runs": st.column_config.NumberColumn("runs"),
    "float_size_bytes": st.column_config.NumberColumn("float size", format=SIZE),
    "size_bytes": st.column_config.NumberColumn("size", format=SIZE),
    "smaller": st.column_config.NumberColumn("smaller", format=SPEEDUP),
    "metric": st.column_config.TextColumn("metric"),
    "accuracy_float": st.column_config.NumberColumn("float's accuracy", format=ACCURACY),
    "accuracy": st.column_config.NumberColumn("accuracy", format=ACCURACY),
    "accuracy_before": st.column_config.NumberColumn("accuracy before", format=ACCURACY),
    "accuracy_now": st.column_config.NumberColumn("accuracy now", format=ACCURACY),
    "speedup": st.column_config.NumberColumn("speed-up", format=SPEEDUP),
    "speedup_before": st.column_config.NumberColumn("speed-up before", format=SPEEDUP),
    "speedup_now": st.column_config.NumberColumn("speed-up now", format=SPEEDUP),
    "busy": st.column_config.CheckboxColumn("busy host"),
    "started_at": st.column_config.DatetimeColumn("run", format=MOMENT),
}
NEWEST = """select model, outcome, verdict, float_size_bytes, size_bytes,
    float_size_bytes / size_bytes as smaller, metric, accuracy_float, accuracy, speedup, busy,
    reason, started_at, output from models
    qualify row_number() over (partition by output order by run_id desc) = 1 order by output"""
HISTORY = """select started_at, speedup, accuracy from models
    where output = ? and outcome <> 'failed' order by run_id"""


def main() -> None:
    """Show the page of the folder that the command line names."""
    st.set_page_config(page_title="quantmill", layout="wide")
    if len(sys.argv) != 2 or not list(Path(sys.argv[1]).glob("models/[!.]*.parquet")):
        st.error("Name a folder of reports: app.py -- OUTPUT_DIR/reports")
        st.stop()
    show(Path(sys.argv[1]))


@st.fragment(run_every=REFRESH_S)
def show(reports: Path) -> None:
    """The state of the last run, the answers to the questions of operations, and every model."""
    show_state(reports)
    answers = {question: ask(question, reports) for question in (*TITLES, "saved")}
    (saved,) = answers["saved"]
    columns = st.columns(5)
    columns[0].metric("models", saved["models"])
    columns[1].metric("saved", format_size(saved["saved_bytes"] or 0))
    columns[2].metric("failed", len(answers["failed"]))
    columns[3].metric("slower or less accurate", len(answers["slower"] + answers["less_accurate"]))
    columns[4].metric("never met", len(answers["never_met"]))
    for question, title in TITLES.items():
        if answers[question]:
            st.subheader(title)
            show_table(answers[question])
    show_models(reports)


def show_state(reports: Path) -> None:
    """What summary.json says: whether a run works, and how the last one ended."""
    try:
        summary = json.loads((reports / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = {"state": "unknown", "message": "there is no summary.json"}
    st.subheader(f"Last run: {summary['state']}")
    st.text(f"{summary['message']}\n{summary.get('written_at', '')}")  # text: it may hold any name


def show_models(reports: Path) -> None:
    """The newest row of each model, and how one of them went over the runs."""
    with connect(reports) as connection:
        models = rows(connection, NEWEST)
        st.subheader("Models")
        show_table(models)
        output = st.selectbox("Over the runs", [row["output"] for row in models])
        history = rows(connection, HISTORY, [output])
    if len(history) < 2:
        st.caption("After a second run its trend is drawn here.")
        return
    left, right = st.columns(2)
    left.line_chart(history, x="started_at", y="speedup", x_label="run", y_label="speed-up")
    right.line_chart(history, x="started_at", y="accuracy", x_label="run", y_label="accuracy")


def show_table(found: list[dict[str, Any]]) -> None:
    """Rows under the headings of COLUMNS."""
    st.dataframe(found, hide_index=True, column_config=COLUMNS)


main()
