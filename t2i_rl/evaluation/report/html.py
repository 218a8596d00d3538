"""The page that holds a run, and the page that holds a sweep: numbers, curves, and images side by side."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from t2i_rl.core.files import read_object, write_atomic
from t2i_rl.evaluation.records import Job, headline_comparison, image_path, read_job, read_jobs, read_stage, stages_of
from t2i_rl.evaluation.report.curves import charts
from t2i_rl.evaluation.report.grid import first_of_each_task
from t2i_rl.evaluation.report.page import definitions, folded, page, section
from t2i_rl.evaluation.report.thumbnails import picture_html
from t2i_rl.evaluation.tables import MARK, Table, differing_settings, headline, run_tables, sweep_tables

PROMPTS_PER_TASK = 3
CHANGES_SHOWN = 6
VERDICTS = {True: '<span class="good">right</span>', False: '<span class="bad">wrong</span>', None: ""}
Key = tuple[str, int]
Shown = tuple[str, Path, dict]


def table_html(table: Table) -> str:
    """A table with its intervals in a softer colour and its marked cells in bold."""
    header = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = []
    for row in table.rows:
        cells = ""
        for cell in row:
            value, bracket, interval = cell.partition(" [")
            soft = f' <span class="range">[{escape(interval)}</span>' if bracket else ""
            cells += f"<td{' class=real' if cell.endswith(MARK) else ''}>{escape(value)}{soft}</td>"
        rows.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def image_set(shown: Sequence[Shown], folder: Path) -> str:
    """One prompt: its images side by side as (label, PNG, record), framed by verdict, with its text and defects.

    Args:
        folder: where the page lies, from which the whole pictures are linked.
    """
    figures = []
    for label, png, record in shown:
        text = f"<br>{record.get('text_is', 'plan')}: {escape(record['plan'])}" if record["plan"] else ""
        defects = f'<br><span class="bad">{escape("; ".join(record["defects"]))}</span>' if record["defects"] else ""
        figures.append(
            f"<figure{' class=strict' if record['strict'] else ''}>{picture_html(png, folder, record['prompt'])}"
            f"<figcaption><b>{escape(label)}</b> {VERDICTS[record['strict']]}{text}{defects}</figcaption></figure>"
        )
    return f'<div class="set"><h3>{escape(shown[0][2]["prompt"])}</h3><div class="row">{"".join(figures)}</div></div>'


def image_sets(sets: Sequence[Sequence[Shown]], folder: Path) -> str:
    """Prompts below one another, or beside one another where their images are few."""
    width = min(1100, 180 * max(len(shown) for shown in sets))
    return f'<div class="sets" style="--set: {width}px">{"".join(image_set(shown, folder) for shown in sets)}</div>'


def largest_changes(before: dict[Key, dict], after: dict[Key, dict], sign: int) -> list[Key]:
    """Keys of the images whose partial score changed most upwards (sign 1) or downwards (-1), largest first."""
    change = {key: sign * (after[key]["score"] - before[key]["score"]) for key in before}
    return [key for key in sorted(change, key=change.__getitem__, reverse=True) if change[key] > 0][:CHANGES_SHOWN]


def image_sections(job: Job) -> str:
    """The images of every stage for a few prompts of each task, then the largest changes in both directions."""
    stages = stages_of(job.results)
    if not stages:
        return section("Images", "Nothing was evaluated (evaluation.stages=[]).", "")
    records = {stage: read_stage(job.folder, stage) for stage in stages}

    def sets_of(keys: Sequence[Key], stages: Sequence[str]) -> str:
        sets = [[(s, image_path(job.folder, s, records[s][k]), records[s][k]) for s in stages] for k in keys]
        return image_sets(sets, job.folder)

    keys = first_of_each_task(list(records[stages[0]].values()), PROMPTS_PER_TASK)
    note = f"The first {PROMPTS_PER_TASK} prompts of each task, same seed in all stages; green frame: strictly right."
    html = section("Images", note, sets_of(keys, stages))
    comparison = headline_comparison(job.results)
    if comparison is None or any(record["score"] is None for record in records[comparison["a"]].values()):
        return html
    pair = (comparison["a"], comparison["b"])
    for title, sign in (("Largest gains", 1), ("Largest losses", -1)):
        keys = largest_changes(records[pair[0]], records[pair[1]], sign)
        note = f"By partial score, {pair[0]} to {pair[1]}: chosen for their size, so not typical."
        html += section(title, note if keys else "None.", sets_of(keys, pair) if keys else "")
    return html


def provenance_section(folder: Path) -> str:
    """Command, commit, dates and whatever else provenance.json holds; nested parts folded away."""
    path = folder / "provenance.json"
    if not path.is_file():
        return '<p class="note">No provenance.json in this run.</p>'
    provenance = read_object(path)
    if provenance.get("status") == "running":  # the page is written before the run ends
        provenance = {key: value for key, value in provenance.items() if key not in ("status", "finished", "error")}
    provenance = {key: value for key, value in provenance.items() if value is not None and value != []}
    nested = {key: value for key, value in provenance.items() if isinstance(value, (dict, list))}
    plain = {key.replace("_", " "): value for key, value in provenance.items() if key not in nested}
    plain = {
        key: {True: "yes", False: "no"}[value] if isinstance(value, bool) else value for key, value in plain.items()
    }
    return definitions(plain) + "".join(folded(key, json.dumps(value, indent=2)) for key, value in nested.items())


def settings_section(results: dict) -> str:
    """Every setting of every part as it ran, defaults of classes among them."""
    if not results.get("settings"):
        return ""
    parts = (folded(name, json.dumps(value, indent=2)) for name, value in results["settings"].items())
    return section("Settings", "As used, with what only the classes give.", "".join(parts))


def curves_section(folder: Path) -> str:
    """The training curves, or the statement that there are none."""
    path = folder / "metrics.csv"
    drawn = charts(path) if path.is_file() else ""
    note = "By step; faint: as logged, strong: running mean. Every logged column is in metrics.csv."
    return section(
        "Training", note if drawn else "No training curves in this run.", f'<div class="charts">{drawn}</div>'
    )


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder and return its path. The page takes nothing from the network.

    Reads results.json, its stages' records and images, and metrics.csv, provenance.json, config.yaml where present.

    Raises:
        UserError: results.json, a stage's records or an image is missing or malformed.
    """
    job = read_job(run_dir)
    results, settings = job.results, job.settings
    title = f"{settings['method']} on {settings['model']}, reward {settings['reward']}, seed {settings['seed']}"
    facts = {key: settings[key] for key in ("method", "model", "reward", "benchmark", "seed", "steps")}
    config = job.folder / "config.yaml"
    body = [
        f'<h1>{escape(title)}</h1><p class="lead">{escape(headline(results))}</p>',
        definitions(facts) + provenance_section(job.folder),
        *(section(table.title, table.note, table_html(table)) for table in run_tables(results)),
        curves_section(job.folder),
        image_sections(job),
        settings_section(results),
        section("Config", "As resolved for this run.", folded("config.yaml", config.read_text(encoding="utf-8")))
        if config.is_file()
        else "",
    ]
    path = job.folder / "report.html"
    write_atomic(path, page(title, "\n".join(body)))
    return path


def sweep_images(jobs: Sequence[Job], folder: Path) -> str:
    """The same prompts for the first job's base and for every job's trained model, side by side; the page lies in
    `folder`."""
    compared = [(job, comparison) for job in jobs if (comparison := headline_comparison(job.results))]
    if not compared:
        return section("Images", "No job has a before and after.", "")
    keys_that_differ = differing_settings(jobs)
    columns = [("base", compared[0][0].folder, compared[0][1]["a"])]
    for job, comparison in compared:
        label = ", ".join(f"{key}={job.settings[key]}" for key in keys_that_differ if key in job.settings)
        columns.append((label or job.folder.name, job.folder, comparison["b"]))
    records = [read_stage(folder, stage) for _, folder, stage in columns]
    shared = [record for key, record in records[0].items() if all(key in other for other in records)]
    if not shared:
        return section("Images", "The jobs were evaluated on different prompts, so nothing can stand side by side.", "")
    sets = [
        [
            (label, image_path(folder, stage, r[key]), r[key])
            for (label, folder, stage), r in zip(columns, records, strict=True)
        ]
        for key in first_of_each_task(shared, PROMPTS_PER_TASK)
    ]
    note = f"The first {PROMPTS_PER_TASK} prompts of each task. `base` is the first job's; green frame: strictly right."
    return section("Images", note, image_sets(sets, folder))


def job_link(folder: Path, sweep_dir: Path) -> str:
    """A job's name, which leads to its own page (to its folder, where it has none)."""
    page_or_folder = folder / "report.html" if (folder / "report.html").is_file() else folder
    return f'<a href="{quote(page_or_folder.relative_to(sweep_dir).as_posix())}">{escape(folder.name)}</a>'


def write_sweep_report(sweep_dir: Path, unfinished: Table | None = None) -> Path:
    """Write `report.html` over all jobs below a sweep folder and return its path; `unfinished` lists those without
    results.

    Raises:
        UserError: no job finished and none is listed, or a job's files are missing or malformed.
    """
    jobs = [] if unfinished and not any(Path(sweep_dir).rglob("results.json")) else read_jobs(sweep_dir)
    findings = "".join(
        f"<dt>{job_link(job.folder, Path(sweep_dir))}</dt><dd>{escape(headline(job.results))}</dd>" for job in jobs
    )
    body = [f"<h1>{len(jobs)} jobs</h1>"]
    tables = [*sweep_tables(jobs), *([unfinished] if unfinished else [])]
    body += [section(table.title, table.note, table_html(table)) for table in tables]
    body += [
        section(
            "Findings",
            "One sentence per job, from its own numbers; its name leads to its own page.",
            f"<dl>{findings}</dl>",
        ),
        sweep_images(jobs, Path(sweep_dir)),
    ]
    path = Path(sweep_dir) / "report.html"
    write_atomic(path, page(f"Sweep {Path(sweep_dir).name}", "\n".join(body)))
    return path
