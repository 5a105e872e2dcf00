#!/usr/bin/env python3
"""A `kubectl` for tests: one namespace store as files, and a kubelet that runs an indexed Job's pods on this machine.

The folder FAKE_CLUSTER holds what was created. With FAKE_CLUSTER_RUNS=1 a created Job's pods really run, as long as the
process FAKE_CLUSTER_OWNER does; cluster DNS is 127.0.0.1, a mounted ConfigMap is a folder. Written from the documented behaviour of indexed Jobs, not from the launcher.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

STORE = Path(os.environ["FAKE_CLUSTER"])
KINDS = {"jobs.batch": "Job", "pods": "Pod", "services": "Service", "configmaps": "ConfigMap"}
KINDS |= {"jobsets.jobset.x-k8s.io": "JobSet"}


def main(argv: list[str]) -> int:
    STORE.mkdir(parents=True, exist_ok=True)
    with (STORE / "calls").open("a") as calls:
        calls.write(json.dumps(argv) + "\n")
    if "FAKE_CLUSTER_DOWN" in os.environ:
        return refuse("The connection to the server 10.0.0.1:6443 was refused: connection refused")
    verb, rest = argv[0], argv[1:]
    return {"create": create, "get": get, "delete": delete, "logs": logs, "kubelet": kubelet}[verb](
        rest
    )


def create(rest: list[str]) -> int:
    documents = list(yaml.safe_load_all(Path(option(rest, "--filename")).read_text()))
    for document in documents:
        if path(document).exists():
            name = document["metadata"]["name"]
            return refuse(f'Error from server (AlreadyExists): "{name}" already exists')
    for document in documents:
        write(path(document), json.dumps(document))
        print(f"{document['kind'].lower()}/{document['metadata']['name']} created")
        if document["kind"] == "Job" and "FAKE_CLUSTER_RUNS" in os.environ:
            with (STORE / "kubelet.log").open("w") as log:
                words = [sys.executable, __file__, "kubelet", document["metadata"]["name"]]
                subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    return 0


def get(rest: list[str]) -> int:
    wanted = {KINDS[name] for name in rest[0].split(",")}
    items = [item for item in stored() if item["kind"] in wanted and selected(item, rest)]
    print(json.dumps({"kind": "List", "items": items}))
    return 0


def delete(rest: list[str]) -> int:
    wanted = {KINDS[name] for name in rest[0].split(",")}
    for item in stored():
        if item["kind"] in wanted and selected(item, rest):
            path(item).unlink()
            print(f'{item["kind"].lower()} "{item["metadata"]["name"]}" deleted')
    return 0


def logs(rest: list[str]) -> int:
    for item in stored():
        if item["kind"] == "Pod" and selected(item, rest):
            name = item["metadata"]["name"]
            for line in (STORE / f"{name}.log").read_text().splitlines():
                print(f"[pod/{name}/ranks] {line}")
    return 0


def kubelet(rest: list[str]) -> int:
    """The Job controller and the node in one: every index until it exits with 0, at most backoffLimit retries in all."""
    [job_path] = STORE.glob(f"Job-*-{rest[0]}.json")
    job = json.loads(job_path.read_text())
    spec = job["spec"]
    running = {index: start(job, index) for index in range(spec["completions"])}
    done: set[int] = set()
    retries = 0
    while len(done) < spec["completions"]:
        time.sleep(0.1)
        if not Path("/proc", os.environ["FAKE_CLUSTER_OWNER"]).exists():
            job_path.unlink(missing_ok=True)  # the test was killed: nothing of it stays behind
        for index, process in list(running.items()):
            if not job_path.exists() and process.poll() is None:
                process.terminate()
            if process.poll() is None:
                continue
            del running[index]
            if process.returncode == 0:
                done.add(index)
                continue
            retries += 1
            if retries > spec["backoffLimit"] or not job_path.exists():
                return finish(job_path, job, running, retries)
            running[index] = start(job, index)
    job["status"] = {
        "conditions": [{"type": "Complete", "status": "True"}],
        "failed": retries,
        "succeeded": len(done),
    }
    write(job_path, json.dumps(job))
    return 0


def finish(job_path: Path, job: dict, running: dict, retries: int) -> int:
    for process in running.values():
        process.terminate()
    for process in running.values():
        process.wait()
    why = {
        "reason": "BackoffLimitExceeded",
        "message": "Job has reached the specified backoff limit",
    }
    job["status"] = {"conditions": [{"type": "Failed", "status": "True", **why}], "failed": retries}
    if job_path.exists():
        write(job_path, json.dumps(job))
    return 0


def start(job: dict, index: int) -> subprocess.Popen:
    name = job["metadata"]["name"]
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(STORE),
    }
    for variable in container["env"]:
        source = variable.get("valueFrom", {})
        if "fieldRef" in source:
            environment[variable["name"]] = str(index)
        elif "value" in variable:
            environment[variable["name"]] = expanded(variable["value"], environment)
    mounted = STORE / "configmap"
    mounted.mkdir(exist_ok=True)
    [config_map] = STORE.glob(f"ConfigMap-*-{name}.json")
    for key, text in json.loads(config_map.read_text())["data"].items():
        write(mounted / key, text)
    words = [expanded(word, environment) for word in (*container["command"], *container["args"])]
    words = [word.replace("/etc/moe-bench", str(mounted)) for word in words]
    words = [word.replace(f"{name}-0.{name}", "127.0.0.1") for word in words]
    pod_object = {
        "kind": "Pod",
        "metadata": {
            "name": f"{name}-{index}",
            "namespace": job["metadata"]["namespace"],
            "labels": job["spec"]["template"]["metadata"]["labels"],
        },
        "spec": {"nodeName": f"node-{index}"},
        "status": {"phase": "Running"},
    }
    write(path(pod_object), json.dumps(pod_object))
    with (STORE / f"{name}-{index}.log").open("a") as log:
        process = subprocess.Popen(
            words, env=environment, stdout=log, stderr=log, cwd=container["workingDir"]
        )
    write(STORE / f"pod-{index}.pid", str(process.pid))
    return process


def expanded(text: str, environment: dict[str, str]) -> str:
    """$(NAME) is the variable where there is one; $$ is a dollar."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_]\w*)\)", value, text)


def write(path: Path, text: str) -> None:
    """The file is there whole or not at all: pods, the kubelet and other calls read meanwhile."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


def stored() -> list[dict]:
    return [json.loads(one.read_text()) for one in sorted(STORE.glob("*.json"))]


def selected(item: dict, rest: list[str]) -> bool:
    if item["metadata"]["namespace"] != option(rest, "--namespace"):
        return False
    key, _, value = option(rest, "--selector").partition("=")
    labels = item["metadata"]["labels"]
    return key in labels and (not value or labels[key] == value)


def path(item: dict) -> Path:
    metadata = item["metadata"]
    return STORE / f"{item['kind']}-{metadata['namespace']}-{metadata['name']}.json"


def option(rest: list[str], name: str) -> str:
    return rest[rest.index(name) + 1]


def refuse(said: str) -> int:
    print(said, file=sys.stderr)
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
