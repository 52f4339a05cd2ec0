"""The log of sampled texts keeps whole lines, with any characters in a text."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextquill.storage.sample_log import SampleLog


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2028\x85\x0c\r\n"), max_size=8)),
    st.integers(0, 8),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_restart_keeps_every_line_of_the_steps_before(tmp_path: Path, texts: list[str], step: int) -> None:
    log = SampleLog(tmp_path, "samples.jsonl")
    log.path.unlink(missing_ok=True)
    lines = [{"step": place, "text": text} for place, text in enumerate(texts)]
    log.append(lines)
    with log.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 0, "te')  # as a killed process leaves it
    log.restart(step)
    kept = [json.loads(line) for line in log.path.read_text(encoding="utf-8").split("\n") if line]
    assert kept == lines[:step]
