"""The page of a noise search: tables, the hacking curves, strips, and the pictures as every report shows them."""

from html import escape
from pathlib import Path

from t2i_rl.core.files import write_atomic
from t2i_rl.evaluation.records import read_job
from t2i_rl.evaluation.report.html import image_sections, provenance_section, table_html
from t2i_rl.evaluation.report.page import definitions, folded, page, section
from t2i_rl.evaluation.report.thumbnails import FIGURE, picture_html
from t2i_rl.evaluation.tables import before_after_table
from t2i_rl.methods.noise.results import health_table, search_table


def write_noise_report(run_dir: Path, shape: tuple[int, ...]) -> Path:
    """Write `report.html` into the folder of a finished search and return its path.

    Args:
        shape: of one case's noise.
    """
    job = read_job(run_dir)
    results, settings = job.results, job.settings
    title = f"{settings['method']} on {settings['model']}, reward {settings['reward']}, seed {settings['seed']}"
    facts = {key: settings[key] for key in ("method", "model", "reward", "seed", "steps")}
    tables = [search_table(results), health_table(results, shape)]
    if "overall" in results["stages"]["initial"]["metrics"]:
        tables.insert(1, before_after_table(results))
    config, strips = job.folder / "config.yaml", sorted((job.folder / "strips").glob("*.png"))
    hacked = "Where a held-out judge falls while the target rises, the target is being hacked."
    on_the_way = (
        "The first cases: pictures, power of the noise by frequency (1 is white), its values beside a Gaussian."
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        definitions({**facts, "regularizer": results["regularizer"]}) + provenance_section(job.folder),
        *(section(table.title, table.note, table_html(table)) for table in tables),
        section("Target and held-out judges", hacked, figure_html(job.folder / "curves.png", job.folder)),
        section("On the way", on_the_way, "".join(figure_html(strip, job.folder) for strip in strips)),
        image_sections(job),
    ]
    if config.is_file():
        text = folded("config.yaml", config.read_text(encoding="utf-8"))
        body.append(section("Config", "As resolved for this run.", text))
    path = job.folder / "report.html"
    write_atomic(path, page(title, "\n".join(body)))
    return path


def figure_html(path: Path, folder: Path) -> str:
    """A figure as wide as the page, which lies in `folder`."""
    return f'<p class="figure">{picture_html(path, folder, path.stem, FIGURE)}</p>'
