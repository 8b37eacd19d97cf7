import json
import re
from pathlib import Path

from PIL import Image

from tests.trainer.run_folder import squad_summary
from trainer.report.squads import squads_section
from trainer.squads.export import CURVE_PICTURE, SQUAD_FILE, SQUAD_FORMAT
from trainer.squads.summary import SquadSummary


def write_squad(folder: Path, summary: SquadSummary) -> None:
    folder.mkdir(parents=True)
    (folder / SQUAD_FILE).write_text(json.dumps({"format": SQUAD_FORMAT, **summary.model_dump(mode="json")}))


def rows_of(body: str) -> list[list[str]]:
    """The cells of the table's rows, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", body, flags=re.DOTALL)
    return [[re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<td.*?>(.*?)</td>", row)] for row in rows]


def test_a_squad_of_several_tasks_has_a_row_for_each(tmp_path: Path) -> None:
    single = squad_summary()
    other = single.scores[0].model_copy(update={"task": "reshading", "metric": "l1", "unaffected_tokens": 0.5})
    write_squad(tmp_path / "squads" / "normal", single)
    write_squad(tmp_path / "squads" / "normal+reshading", single.model_copy(update={"scores": (*single.scores, other)}))
    alone, first, second = rows_of(squads_section(tmp_path).body)[1:]
    assert alone == first
    assert first[:5] == ["normal", "4 of 8", "2 M → 900 k", "50 M → 50 M", "mean_angle_deg"]
    assert second[:5] == ["reshading", "", "", "", "l1"]
    assert second[7:] == ["+0.50 %", "50.00 %", "75.00 %", "40"]


def test_the_trade_off_is_shown_where_there_is_one(tmp_path: Path) -> None:
    for name in ("normal", "other"):
        write_squad(tmp_path / "squads" / name, squad_summary())
    assert "<img" not in squads_section(tmp_path).body
    Image.new("RGBA", (4, 4)).save(tmp_path / "squads" / "normal" / CURVE_PICTURE)
    body = squads_section(tmp_path).body
    assert body.count("data:image/png;base64,") == 1
    assert "Squads of normal: what other thresholds" in body
