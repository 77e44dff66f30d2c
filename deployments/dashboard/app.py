"""A live page over the reports of an output folder.

python -m streamlit run deployments/dashboard/app.py -- OUTPUT_DIR/reports
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import streamlit as st

from deployments.dashboard.with_duckdb import ask, connect, rows

REFRESH_S = 10
TITLES = {
    "failed": "What failed, and why",
    "slower": "What got slower since last week",
    "less_right": "What got less right since last week",
    "never_met": "What never met its contract",
}
NEWEST = """select model, output, outcome, verdict, reason, size_bytes, size_ratio, metric,
    accuracy_float, accuracy, speedup, busy, started_at from models
    qualify row_number() over (partition by output order by started_at desc) = 1 order by output"""
HISTORY = """select started_at, speedup, accuracy from models
    where output = ? and outcome <> 'failed' order by started_at"""


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
    columns[1].metric("saved", f"{(saved['saved_bytes'] or 0) / 1e6:.1f} MB")
    columns[2].metric("failed", len(answers["failed"]))
    columns[3].metric("slower or less right", len(answers["slower"] + answers["less_right"]))
    columns[4].metric("never met", len(answers["never_met"]))
    for question, title in TITLES.items():
        if answers[question]:
            st.subheader(title)
            st.dataframe(answers[question], hide_index=True)
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
        st.dataframe(models, hide_index=True)
        output = st.selectbox("Over the runs", [row["output"] for row in models])
        history = rows(connection, HISTORY, [output])
    left, right = st.columns(2)
    left.line_chart(history, x="started_at", y="speedup")
    right.line_chart(history, x="started_at", y="accuracy")


main()
