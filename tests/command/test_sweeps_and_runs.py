"""The command line from within: folder names of sweeps, what `last` stands for, one-line errors."""

import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from t2i_rl.command.compose import name_jobs_by_what_differs
from t2i_rl.command.folder_names import folder_name
from t2i_rl.command.provenance import record
from t2i_rl.command.resume import COMPARED, continue_in_place
from t2i_rl.command.sweep import optimized
from t2i_rl.core.errors import UserError
from t2i_rl.core.places import CONF
from t2i_rl.methods.identity import own_part
from tests.support.commands import call

NEEDED = ("paths", "variant", "kind", "family", "presets", "tables")  # by what a resume compares
FAKE_TASK = "task._target_=tests.command.test_sweeps_and_runs.fake_task"
seen: list[tuple[str, float, str]] = []


def fake_task(cfg) -> dict:
    """Stands in for training: leaves as much behind as it can, and fails where the seed is 1."""
    import os

    seen.append((Path(cfg.paths.output_dir).name, float(torch.rand(())), os.environ.get("LOCAL_RANK", "none")))
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"
    if cfg.seed == 1:
        raise RuntimeError("a bug")
    return {"stages": {"trained_plan": {"metrics": {"overall": {"mean": 0.5}}}}}


def test_a_sweep_names_its_folders_by_what_differs_and_leaks_nothing(tmp_path, monkeypatch, capsys):
    seen.clear()
    threads = torch.get_num_threads()
    code = call(monkeypatch, tmp_path, "-m", FAKE_TASK, "method.kl_coef=0", "seed=0,1,2", "trainer=cpu,auto")
    names, draws, ranks = zip(*seen)
    assert code == 1 and set(names) == {f"seed={seed},trainer={name}" for seed in range(3) for name in ("cpu", "auto")}
    assert draws[0] == draws[1] and draws[4] == draws[5] != draws[0] and set(ranks) == {"none"}
    assert torch.get_default_dtype() == torch.float32 and torch.get_num_threads() == threads
    captured = capsys.readouterr()
    assert captured.out.count("failed:") == 2 and "RuntimeError: a bug" in captured.err
    assert len(list(tmp_path.rglob("provenance.json"))) == 6
    assert not list(tmp_path.rglob("*.log"))  # Hydra's, which was always empty
    assert sys.argv == ["run.py", "-m", FAKE_TASK, "method.kl_coef=0", "seed=0,1,2", "trainer=cpu,auto"]


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="a bug"):
        call(monkeypatch, tmp_path, FAKE_TASK, "seed=1", "hydra.run.dir=out")
    assert '"status": "failed"' in (tmp_path / "out" / "provenance.json").read_text()


def test_a_sweep_optimises_what_the_headline_is_about():
    means = {"base_plan": 1, "trained_turn2": 2, "trained_stopped": 3}
    stages = {name: {"metrics": {"overall": {"mean": mean}}} for name, mean in means.items()}
    headline = {"a": "base_plan", "b": "trained_turn2"}
    assert optimized({"stages": stages, "headline": headline}, "headline") == 2
    assert optimized({"stages": stages, "headline": None}, "overall") == 3
    assert optimized({"stages": {}}, "overall") is None and optimized({"stages": stages}, None) is None


@pytest.mark.parametrize(
    ("kind", "checkpoint", "said"),
    [
        ("grpo", {"irg": {}}, "take method=irg"),
        ("irg", {"grpo": {}}, "take method=iris"),
        ("pairs", {}, "give one of this method's"),
    ],
)
def test_a_checkpoint_of_another_method_is_named(kind, checkpoint, said):
    with pytest.raises(UserError, match=said):
        own_part(checkpoint, kind)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["methd=iris"], "method"),
        (["-m", "reward=nsq,nsc"], "choose from aesthetic, clip"),
        (["~reward"], "choose from aesthetic, clip"),
        (["seed=abc"], "whole number"),
        (["reward._target_=t2i_rl.rewards.nope.Nope"], "there is no such class"),
        (["data=prompts", "data.path=nowhere.txt"], "nowhere.txt"),
        (["evaluation.stages=[trained]"], "trained_plan"),
        ([FAKE_TASK, "optimized_metric=nonsense"], "choose from overall"),
        (["method.optimizer.lr=abc"], "must be a number"),
        (["method.optimizer.lr=-1"], "method.optimizer.lr must be a number above 0"),
        (["method.group_size=2.5"], "whole number"),
        (["method.group_size=1"], "2 or more"),
        (["method.lora={rr:3}"], "unexpected keyword argument 'rr'"),
        (["method.lora={r:4,use_dora:true}"], "method.lora.use_dora"),
        (["method.plan=false", "method.image_loss_weight=0"], "nothing would be trained"),
        (["model.temperature=0"], "above 0"),
        (["model.dtype=bfloat16"], "bf16-mixed"),
        (["model.rollout.dtype=float99"], "model.rollout.dtype"),
        (["model.rollout.max_rows=many"], "must be a whole number"),
        (["model=janus"], "path=<folder"),
        (["model=janus", "path=./nowhere"], "no such folder"),
        (["reward=hpsv2", "reward.processor=./nowhere"], "no such folder"),
        (["reward=orm"], "reward.path"),
        (["reward=gdino", "~watch.oracle"], "data=t2i_r1"),  # before its checkpoint is looked for
        (["reward=t2i_r1", "reward.parts.orm.path=x"], "'nouns'"),
        (["task=make_prompts", "task.counts.counting=-1"], "task.counts.counting"),
        (["task=make_prompts", "+task.counts.sizes=3"], "choose from"),
        (["task=make_prompts", "task.out=plain.txt"], "there already"),
        (["data=t2i_r1", "data.path=annotated.jsonl", "data.batch_size=1", "reward=random"], "no shape of this world"),
        (["data=t2i_r1", "data.path=plain.txt", "data.batch_size=1", "reward=random"], "plain.txt:1"),
        (["task=export", "task.adapter=true"], "ckpt_path"),
        (["benchmark.split=val"], "validation"),
        (["task=generate", "prompt=a red circle", "num_images=0"], "num_images"),
        (["trainer.devices=0"], "trainer.devices must be"),
        (["reward=length", "method.plan=false", "method.image_loss_weight=1"], "set method.plan=true"),
        (["benchmark.size=48"], "draws 32x32"),
        (["task=evaluate", "benchmark.size=48"], "draws 32x32"),
        (["data=prompts", "data.path=plain.txt", "data.batch_size=1"], "~watch.oracle"),
        (
            ["data=prompts", "data.path=plain.txt", "data.batch_size=1", "~watch.oracle", "reward=oracle"],
            "another reward",
        ),
        (["method=softrepa"], "model=flux_schnell, flux_tiny, sd15, sd3,"),
        (["model=sd_tiny"], "model=janus"),
        (["reward=none"], "reward=aesthetic, clip"),
        (["data=shapes_pairs"], "data=shapes"),
        (["method=agsm", "model=sd_tiny", "reward=oracle"], "reward=none"),
        (["method=agsm", "model=sd_tiny", "data=shapes"], "data=shapes_pairs"),
        (["method=agsm", "model=sd_tiny", "variant=old"], "ours, paper, released"),
        (["method=agsm", "model=sd_tiny", "method.reduction=max"], "mean, sum"),
        (["method=agsm", "model=sd_tiny", "method.optimizer.lr=-1"], "method.optimizer.lr must be a number above 0"),
        (["method=agsm", "model=sd_tiny", "trainer=fsdp_sim"], "trainer=ddp"),
        (["method=agsm", "model=sd_tiny", "trainer.precision=16-mixed"], "bf16-mixed"),
        (["method=agsm", "model=sd_tiny", "trainer.precision=bf16-true"], "rounds what learns"),
        (["method=agsm", "model=sd_tiny", "model.dtype=float16"], "loss scaling"),
        (["method=softrepa", "model=sd_tiny", "data.tasks=[single_object]", "data.batch_size=16"], "more tasks"),
        (["task=export", "model=sd_tiny", "method=denoising", "ckpt_path=tokens.ckpt"], "soft_tokens.safetensors"),
        (["method=agsm", "model=sd_tiny", "evaluation.stages=[base_plan]"], "no plans"),
        (["method=agsm", "model=sd_tiny", "data.batch_size=1"], "2 or more"),
        (["method=agsm", "model=sd_tiny", "model.size=48"], "draws 48x48"),
        (
            ["method=agsm", "model=sd_tiny", "model.size=48", "evaluation.stages=[]"],
            "callbacks.validation.benchmark=null",
        ),
        (["method=denoising", "model=sd_tiny", "method.tokens=0"], "method.lora"),
        (["method=noise_opt", "reward=oracle"], "method=noise_search"),
        (["method=noise_opt", "reward=t2i_r1", "reward.parts.orm.path=x"], "GroundingDino"),
        (["method=noise_opt", "task=train"], "leave task= out"),
        (["task=optimize_noise"], "take method=noise_opt"),
        (["regularizer=mpgr"], "take method=noise_opt"),
        (["method=noise_opt", "model=janus_tiny"], "flux_tiny"),
        (["method=noise_opt", "method.eta=1"], "DDIM"),
        (["method=noise_opt", "method.balance=0"], "above 0"),
        (["method=noise_opt", "method.optimizer.lr=-1"], "method.optimizer.lr must be a number above 0"),
        (["method=noise_opt", "method.held_out=beauty"], "not watched"),
        (["method=noise_opt", "regularizer.terms.spectrum.permutation=often"], "natural+fresh"),
        (["method=noise_search", "method.algorithm=genetic"], "best_of_n, zero_order"),
        (["method=noise_opt", "data=prompts", "data.path=plain.txt"], "data=shapes"),
        (["method=noise_opt", "model=flux_schnell"], "FLUX.1-schnell"),
        (["task=gaussianity"], "latents="),
        (["task=gaussianity", "latents=plain.txt"], "latents=plain.txt"),
        (["method=softrepa", "model=sd15"], "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (["method=softrepa", "model=sdxl", "data=coco"], "data.path"),
        (["method=softrepa", "model=sd_tiny", "data=coco", "data.path=."], "annotations"),
        (["task=edit", "model=sd_tiny"], "sd3_tiny"),
        (["task=edit", "model=sd3_tiny", "image=plain.txt"], "task.source"),
        (["task=edit", "model=sd3_tiny", "task.start=51"], "task.start is from 0 to task.steps=50"),
        (
            [
                "method=agsm",
                "model=sd_tiny",
                "callbacks.validation.fid={_target_: t2i_rl.evaluation.inception.InceptionFeatures, images: nowhere}",
            ],
            "fid.images=nowhere",
        ),
        (["reward=image_reward", "reward.tokenizer=./nowhere"], "no such folder"),
        (["task=generate", "model=sd_tiny", "prompt=a red circle", "mode=plan"], "mode=direct"),
        (["task=import_soft_tokens", "model=sd15", "task.tokens=plain.txt", "task.times=plain.txt"], "torch.save"),
        (["task=encode", "model=sd_tiny", "method=agsm", "task.out=enc"], "data=coco"),
        (["task=export", "model=sd_tiny", "method=agsm", "ckpt_path=tokens.ckpt"], "soft_tokens.safetensors"),
        (["task=export", "model=sd_tiny", "method=agsm", "ckpt_path=plain.txt"], "no checkpoint of a training run"),
        (["task=pretrain", "model=sd15"], "sd_tiny, sd3_tiny"),
    ],
)
def test_refusals_are_exactly_one_line_before_any_weight_loads(tmp_path, monkeypatch, capfd, arguments, named):
    (tmp_path / "plain.txt").write_text("a red circle\n")
    torch.save({"state_dict": {}, "global_step": 1, "pairs": {}}, tmp_path / "tokens.ckpt")
    row = '{"prompt": "a car", "task_type": "object", "nouns": ["car"], "include": [{"class": "car", "count": 1}]}'
    (tmp_path / "annotated.jsonl").write_text(row + "\n")
    monkeypatch.setattr("t2i_rl.models.autoregressive.janus.load_pretrained", None)
    monkeypatch.setattr("t2i_rl.models.diffusion.base.load_pipeline", None)
    assert call(monkeypatch, tmp_path, *arguments) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0]


def test_a_path_out_of_a_sweep_may_be_pasted_as_it_is(tmp_path, monkeypatch):
    job = tmp_path / "reward=oracle,seed=0"
    job.mkdir()
    seen.clear()
    assert call(monkeypatch, tmp_path, FAKE_TASK, f"hydra.run.dir={job}") == 0 and seen[0][0] == job.name


@pytest.mark.parametrize(("available", "name"), [(True, "gpu"), (False, "cpu")])
def test_the_accelerator_is_cuda_or_the_cpu(monkeypatch, available, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert OmegaConf.create({"accelerator": "${gpu_or_cpu:}"}).accelerator == name


def test_options_may_stand_anywhere():
    excluded = "hydra.job.config.override_dirname.exclude_keys=['model']"
    arranged = name_jobs_by_what_differs(["seed=0,1", "model=janus_tiny", "-m", "--config-dir", "mine"])
    assert arranged == ["-m", "--config-dir", "mine", "--", "seed=0,1", "model=janus_tiny", excluded]
    assert name_jobs_by_what_differs(arranged)[:-2] == arranged[:-1]  # a process that DDP launches does so again


def test_a_long_folder_name_is_cut_and_stays_its_own():
    first, second = (folder_name(f"experiment=a/b,x={'y' * 300}{tail}") for tail in "12")
    assert len(first) < 200 and first != second and "/" not in first and folder_name("") == "job"


def finished_run(folder: Path) -> Path:
    """A run folder as task=train leaves it, as far as a resume reads it."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["reward=oracle"])
    run = folder / "outputs" / "train" / "it's a run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {}, "global_step": 1}, run / "checkpoints" / "last.ckpt")
    kept = {key: OmegaConf.to_container(cfg, resolve=False)[key] for key in (*NEEDED, *COMPARED)}
    kept["paths"].pop("output_dir"), kept["presets"].pop("iris_janus_pro")
    OmegaConf.save(OmegaConf.create(kept), run / "config.yaml", resolve=True)
    return run.relative_to(folder)


def test_last_goes_on_in_the_run_and_evaluates_it_elsewhere(tmp_path, monkeypatch):
    run = finished_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    quoted = str(run).replace("'", "\\'")
    train = continue_in_place(["reward=oracle", "ckpt_path=last", "trainer.max_steps=9"], CONF)
    assert train == ["reward=oracle", f"hydra.run.dir='{quoted}'", "ckpt_path=last", "trainer.max_steps=9"]
    evaluated = continue_in_place(["task=evaluate", "reward=oracle", "ckpt_path=last"], CONF)
    assert evaluated == ["task=evaluate", "reward=oracle", f"ckpt_path='{quoted}/checkpoints/last.ckpt'"]
    for other in (["reward=nsc"], ["reward=oracle", "seed=5"], ["-m", "reward=oracle"]):
        with pytest.raises(UserError):
            continue_in_place([*other, "ckpt_path=last"], CONF)


def test_a_folder_run_in_again_keeps_where_it_came_from(tmp_path):
    for number in range(3):
        facts = record(tmp_path, ["run.py", f"seed={number}"], [])
    assert [entry["command"][-6:] for entry in facts["earlier"]] == ["seed=0", "seed=1"]
