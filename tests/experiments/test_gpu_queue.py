"""The queue for a lent GPU, with made-up items that take a moment: in order, bounded, cut, gone on with, taken home."""

import json
import sys
import tarfile
import time
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest

from experiments.gpu import bounded, lease, pack
from experiments.gpu.bounded import Log, run_bounded
from experiments.gpu.command import check, main
from experiments.gpu.items import ITEMS, Item
from experiments.gpu.record import Results

NAME = "a made-up device"


MADE_UP = {
    name: Item(name, f"{name}, made up", f"tests.support.made_up_items:{name}", least=1, most=seconds)
    for name, seconds in {"slow": 3, "broken": 20, "quick": 20, "tired": 20}.items()
}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder that stands for experiments/gpu, on a machine with a GPU."""
    monkeypatch.setattr(lease, "MARGIN", 0.0)
    monkeypatch.setattr(bounded, "GRACE", 0.5)
    monkeypatch.setattr("experiments.gpu.command.shutil.which", lambda program: f"/bin/{program}")
    monkeypatch.setattr("experiments.gpu.command.device_name", lambda device: NAME)
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "done.json").write_text("{}\n")
    return folder


def run(home: Path, out: Path, names: tuple[str, ...], *options: str, minutes: float = 0.5) -> int:
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "source.tar.gz", "w:gz") as tar:
        tar.add(__file__, arcname="model/config.json")
    arguments = ["--minutes", str(minutes), "--out", str(out), *options]
    return main(arguments, [MADE_UP[name] for name in names], home, home.parent / "outputs")


def test_every_item_has_its_turn_and_leaves_what_it_measured(home, tmp_path, capsys):
    """One is cut by the clock, one fails, one is done, one stops by itself: each keeps its measurements."""
    out = tmp_path / "out"
    assert run(home, out, ("slow", "broken", "quick", "tired")) == 1
    said = capsys.readouterr().out
    for line in ("slow: cut by the clock", "broken: failed: exit code 1", "quick: done", "tired: cut by the clock"):
        assert line in said
    assert said.index("slow: cut") < said.index("broken: failed") < said.index("quick: done")
    assert "RuntimeError: a bug in the measurement" in said  # the end of its log
    items = Results(out / "results.json").items
    assert items["slow"]["measured"].keys() == {"0", "1", "2"} and items["broken"]["measured"] == {"half": 1}
    assert items["slow"]["seconds"] >= 3 and items["slow"]["device"] == NAME and "torch" in items["slow"]["versions"]
    done = json.loads((out / "done.json").read_text())
    assert done.keys() == {"quick"} and done["quick"].keys() == {
        *("what", "when", "commit", "device", "command", "seconds")
    }
    text = (out / "tables.md").read_text()
    assert "| answer | 42 |" in text and "## slow: cut by the clock" in text and "trial" not in text
    log = (out / "log.txt").read_text()
    assert log.count("=====") == 4 and "a word" in log and "out of time: the second does not fit" in log


def test_a_lease_taken_home_closes_what_is_done_and_the_next_goes_on_with_what_is_not(home, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    run(home, first, ("quick", "slow"))
    assert main(["--collect", str(first)], ITEMS, home, tmp_path / "outputs") == 0
    assert json.loads((home / "done.json").read_text())["quick"]["device"] == NAME
    assert "| answer | 42 |" in (home / "results" / "quick.md").read_text()
    assert (tmp_path / "outputs" / "sd_tiny" / "model" / "config.json").read_text() == Path(__file__).read_text()
    assert "task=evaluate model=sd_tiny" in capsys.readouterr().out
    kept = json.loads((home / "results" / "slow.json").read_text())
    kept["measured"]["fast"] = True
    (home / "results" / "slow.json").write_text(json.dumps(kept))
    assert run(home, second, ("quick", "slow")) == 0
    assert "quick: quick, made up; " not in capsys.readouterr().out  # the line that begins it
    items = Results(second / "results.json").items
    assert items.keys() == {"slow"} and len(items["slow"]["measured"]) == 11
    assert items["slow"]["seconds"] > kept["seconds"]
    assert json.loads((second / "done.json").read_text()).keys() == {"quick", "slow"}


def test_another_device_begins_anew_and_so_does_what_is_asked_for_again(home, tmp_path, monkeypatch):
    run(home, tmp_path / "first", ("slow", "quick"))
    main(["--collect", str(tmp_path / "first")], ITEMS, home, tmp_path / "outputs")
    results = home / "results" / "slow.json"
    results.write_text(results.read_text().replace(NAME, "another device"))
    run(home, tmp_path / "second", ("slow", "quick"), "--again", "quick")
    items = Results(tmp_path / "second" / "results.json").items
    assert items["slow"]["device"] == NAME and items["slow"]["measured"].keys() == {"0", "1", "2"}
    assert items["quick"]["measured"] == {"answer": 42}


def test_an_item_that_does_not_fit_is_not_begun(home, tmp_path, capsys):
    assert run(home, tmp_path / "out", ("quick",), minutes=0.01) == 0
    assert "quick: not begun" in capsys.readouterr().out
    assert Results(tmp_path / "out" / "results.json").items == {} and not (tmp_path / "out" / "done.json").exists()


def test_a_trial_is_marked_never_done_and_not_taken_home(home, tmp_path, capsys):
    assert run(home, tmp_path / "out", ("quick",), "--sizes", "tiny", "--device", "cpu") == 0
    assert not (tmp_path / "out" / "done.json").exists()
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "None of its numbers is a result" in text and "quick: ran through, which a trial does not count" in text
    assert main(["--collect", str(tmp_path / "out")], ITEMS, home, tmp_path / "outputs") == 2
    assert "holds a trial" in capsys.readouterr().err and not (home / "results").exists()


def test_a_process_that_is_stopped_takes_its_children_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "GRACE", 0.5)
    child = f"import time; time.sleep(1.5); open({str(tmp_path / 'alive')!r}, 'w').close()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    assert run_bounded([sys.executable, "-c", parent], 0.5, Log(tmp_path / "log"), tmp_path, {}) is None
    assert time.monotonic() - started < 1.5
    time.sleep(1.5)
    assert not (tmp_path / "alive").exists()


def test_a_log_keeps_its_first_and_its_last_words_and_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "HEAD", 100)
    monkeypatch.setattr(bounded, "TAIL", 1000)
    log = Log(tmp_path / "log")
    for count in (10, 200, 5000):
        run_bounded([sys.executable, "-c", f"for i in range({count}): print(i)"], 9, log, tmp_path, {})
        text = log.path.read_text()
        assert text.startswith("0\n1\n") and text.endswith(f"\n{count - 1}\n") and len(text) < 1200
        assert log.last_lines(2) == f"{count - 2}\n{count - 1}"
        assert ("bytes are left out here" in text) == (count == 5000)
        assert count == 5000 or text == "".join(f"{i}\n" for i in range(count))
        log.path.unlink()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "x"], "give --minutes"),
        (["--minutes", "0", "--out", "x"], "give --minutes"),
        (["--minutes", "1", "--out", "x", "--again", "nothing"], "there is no item 'nothing'; the items are rollout"),
        (["--minutes", "1", "--out", "x"], "there is no GPU here: for a trial take --sizes tiny --device cpu"),
        (["--minutes", "1", "--out", "x", "--device", "cpu"], "real sizes need a GPU"),
        (["--collect", "nowhere"], "nowhere holds no results.json"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.gpu.command.shutil.which", lambda program: None)
    assert main(options, ITEMS, tmp_path, tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_python_that_lacks_a_package_or_has_an_old_one_says_so_at_once(monkeypatch):
    monkeypatch.setattr("experiments.gpu.command.BROUGHT", {"transformers": "99", "no-such-package": "1"})
    given = SimpleNamespace(minutes=1, out=Path("x"), again=[], only=None, device="cpu", sizes="tiny")
    with pytest.raises(Exception, match="lacks transformers, no-such-package: pack them at home with"):
        check(given, ITEMS)


def test_the_archive_for_the_other_machine_holds_what_is_imported_and_no_sources_of_models():
    assert pack.is_needed(("transformers", "models", "llama", "modeling_llama.py"))
    assert pack.is_needed(("diffusers", "modular_pipelines", "modular_pipeline.py"))
    assert not pack.is_needed(("transformers", "models", "gemma2", "modular_gemma2.py"))
    assert not pack.is_needed(("..", "..", "bin", "transformers")) and not pack.is_needed(("x", "__pycache__", "y.pyc"))


def test_the_queue_is_what_was_asked_for_and_its_files_fit_what_comes_back():
    assert [item.name for item in ITEMS] == ["rollout", "step", "suite", "diffusion", "pretrain"]
    assert all(callable(getattr(resolve_name(item.target), name)) for item in ITEMS for name in ("run", "table"))
    files = ("results.json", "done.json", "tables.md", "log.txt", *(f"{name}_tiny.tar.gz" for name in "abcd"))
    assert len(files) <= 8  # of which four are weights; a lent machine gives back no more
