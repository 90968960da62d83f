"""The report of lanes of which none has verified a case: what ran and what did not is all there is to tell."""

import json
from collections.abc import Sequence
from pathlib import Path

from moe_ref.report.document import REPORT_SCHEMA
from moe_ref.report.lanes import LaneRow, head_section, lane_document, lane_section, with_lanes
from moe_ref.report.markdown import block, fit
from moe_ref.report.render import Report
from moe_ref.report.summary import SUMMARY_BUDGET

_HEAD = ("PASS  lanes: no case was verified", "on    -", "cases 0 chosen, 0 executed", "first nothing failed",
         "close no passing case with a measured ratio")


def render_lanes(rows: Sequence[LaneRow], out: Path) -> Report:
    """Write summary.md and report.json into `out`, which is made if need be; head lines and exit code of the lanes."""
    head, code = with_lanes(_HEAD, 0, rows)
    data: dict[str, object] = {"schema": REPORT_SCHEMA, "verdict": "fail" if code else "pass", "exit_code": code,
                               "head": list(head), "lanes": lane_document(rows)}
    sections = [section for section in (lane_section(rows), head_section(rows)) if section.rows]
    texts = {"summary.md": fit(block("\n".join(head)) + "\n\n", sections, SUMMARY_BUDGET),
             "report.json": json.dumps(data, indent=1) + "\n"}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return Report(head, code, data, tuple(out / name for name in texts))
