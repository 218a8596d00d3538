"""The page of a noise search: tables, the hacking curves, strips, and the pictures as every report shows them."""

import base64
from html import escape
from pathlib import Path

from t2i_rl.core.files import write_atomic
from t2i_rl.evaluation.records import read_job
from t2i_rl.evaluation.report.html import image_sections, provenance_section, table_html
from t2i_rl.evaluation.report.page import definitions, folded, page, section
from t2i_rl.evaluation.tables import before_after_table
from t2i_rl.methods.noise.results import health_table, search_table


def write_noise_report(run_dir: Path, shape: tuple[int, ...]) -> Path:
    """Write `report.html` into the folder of a finished search and return its path.

    Args:
        shape: of one case's noise.
    """
    job = read_job(run_dir)
    results, settings = job.results, job.settings
    facts = {key: settings[key] for key in ("method", "model", "reward", "seed", "steps")} | {
        "regularizer": results["regularizer"]
    }
    tables = [search_table(results), health_table(results, shape)]
    if "overall" in results["stages"]["initial"]["metrics"]:
        tables.insert(1, before_after_table(results))
    config, strips = job.folder / "config.yaml", sorted((job.folder / "strips").glob("*.png"))
    body = [
        f"<h1>{escape(settings['method'])} on {escape(settings['model'])}, reward {escape(settings['reward'])}, seed {settings['seed']}</h1>",
        definitions(facts) + provenance_section(job.folder),
        *(section(table.title, table.note, table_html(table)) for table in tables),
        section("Target and held-out judges", "Where a held-out judge falls while the target rises, the target is being hacked.", _picture(job.folder / "curves.png")),
        section("On the way", "The first cases: pictures, power of the noise by frequency (1 is white), its values beside a Gaussian.", "".join(map(_picture, strips))),
        image_sections(job),
        section("Config", "As resolved for this run.", folded("config.yaml", config.read_text(encoding="utf-8"))) if config.is_file() else "",
    ]  # fmt: skip
    path = job.folder / "report.html"
    write_atomic(path, page(f"{settings['method']} on {settings['model']}", "\n".join(body)))
    return path


def _picture(path: Path) -> str:
    return f'<p style="max-width: none"><img alt="{escape(path.stem)}" style="max-width: 100%" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></p>'
