"""The manifests and the chart of deploy/, as kubectl and Helm render them, against what they should be.

Called by scripts/check-deploy with the version of the product and the path of kubectl. Renders offline; prints one line per part.
"""

import json
import subprocess
import sys
from pathlib import Path

import helm_python
import yaml

DEPLOY = Path(__file__).parent.parent / "deploy"
CHART = DEPLOY / "helm" / "lcow-graphdriver"
NAMESPACE = "lcow-system"
RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": 65534,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
INSTALLER = {
    "runAsUser": 0,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"], "add": ["SYS_CHROOT"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def equal(found, expected, what):
    if found != expected:
        sys.exit(f"check-deploy: {what}:\n  expected {json.dumps(expected)}\n  found    {json.dumps(found)}")


def by_kind(documents):
    """Objects by kind; each kind occurs once."""
    objects = {}
    for document in documents:
        if document is None:
            continue
        for field in ("apiVersion", "kind", "metadata"):
            if field not in document:
                sys.exit(f"check-deploy: an object without {field}: {document}")
        if document["kind"] in objects:
            sys.exit(f"check-deploy: two objects of kind {document['kind']}")
        objects[document["kind"]] = document
    return objects


def environment(container):
    return {entry["name"]: entry["value"] for entry in container.get("env", [])}


def check_pod(daemonset, what, mode, image, installer=INSTALLER):
    """What all pods have: least rights, and containers that run the image's scripts."""
    labels = daemonset["spec"]["template"]["metadata"]["labels"]
    selector = daemonset["spec"]["selector"]["matchLabels"]
    equal({key: labels.get(key) for key in selector}, selector, f"{what}: labels of the pod for its selector")
    pod = daemonset["spec"]["template"]["spec"]
    for field in ("hostPID", "hostNetwork", "hostIPC"):
        equal(pod.get(field, False), False, f"{what}: {field}")
    equal(pod["automountServiceAccountToken"], False, f"{what}: token")
    (init,), (wait,) = pod["initContainers"], pod["containers"]
    equal((init["name"], init["command"]), (mode, [f"/opt/lcow/{mode}"]), f"{what}: the first container")
    equal(wait["command"], ["/opt/lcow/wait"], f"{what}: the second container")
    for command in (init["command"], wait["command"]):
        equal((DEPLOY / "host" / Path(command[0]).name).is_file(), True, f"{what}: script {command[0]}")
    equal([init["image"], wait["image"]], [image, image], f"{what}: image")
    equal(init["securityContext"], installer, f"{what}: rights of {mode}")
    equal(wait["securityContext"], RESTRICTED, f"{what}: rights of wait")
    equal(wait.get("volumeMounts"), None, f"{what}: what wait sees of the host")
    mounted = {mount["name"] for mount in init["volumeMounts"]}
    equal(mounted, {volume["name"] for volume in pod["volumes"]}, f"{what}: volumes")
    equal(pod["volumes"][0], {"name": "host", "hostPath": {"path": "/", "type": "Directory"}}, f"{what}: the host")
    return pod


def kustomize(name):
    output = subprocess.run([sys.argv[2], "kustomize", DEPLOY / "kubernetes" / name], capture_output=True, text=True)
    if output.returncode != 0:
        sys.exit(f"check-deploy: kubectl kustomize {name}: {output.stderr}")
    return by_kind(yaml.safe_load_all(output.stdout))


def manifests():
    for name, mode in (("base", "install"), ("uninstall", "uninstall")):
        objects = kustomize(name)
        equal(sorted(objects), ["DaemonSet", "Namespace", "ServiceAccount"], f"{name}: objects")
        equal(objects["Namespace"]["metadata"]["name"], NAMESPACE, f"{name}: namespace")
        for kind in ("DaemonSet", "ServiceAccount"):
            equal(objects[kind]["metadata"]["namespace"], NAMESPACE, f"{name}: namespace of {kind}")
        pod = check_pod(objects["DaemonSet"], name, mode, "lcow-graphdriver")
        equal(pod["serviceAccountName"], objects["ServiceAccount"]["metadata"]["name"], f"{name}: account")
        equal(environment(pod["initContainers"][0]), {"LCOW_FACES": "containerd"}, f"{name}: environment")
        print(f"kustomize {name}: ok")
    objects = kustomize("runtimeclass")
    equal((list(objects), objects["RuntimeClass"]["handler"]), (["RuntimeClass"], "lcow"), "runtimeclass")
    print("kustomize runtimeclass: ok")


def render(chart, values, release="node"):
    rendered = chart.render(values, name=release, namespace=NAMESPACE)
    documents = []
    notes = ""
    for path, text in rendered.items():
        if path.endswith("NOTES.txt"):
            notes = text
        elif path.endswith(".yaml"):
            documents.extend(yaml.safe_load_all(text))
    return by_kind(documents), notes


def refused(chart, values, part):
    try:
        chart.render(values, name="node", namespace=NAMESPACE)
    except helm_python.HelmError as error:
        equal(part in str(error), True, f"the error for {values} names {part!r}: {error}")
    else:
        sys.exit(f"check-deploy: values were accepted: {values}")


def chart(version):
    loaded = helm_python.Chart.load(CHART)
    equal((loaded.version, loaded.metadata["appVersion"]), (version, version), "versions of the chart")
    arguments = {
        "minimal": None,
        "default-snapshotter": {"LCOW_CONTAINERD_ARGUMENTS": "--default", "LCOW_CONTAINERD_RESTART": "true"},
        "runtime-class": {
            "LCOW_CONTAINERD_ARGUMENTS": "--runtime=vhd=io.containerd.runc.v2 --config-version 2",
            "LCOW_CONTAINERD_RESTART": "false",
        },
    }
    equal(sorted(p.name.removesuffix("-values.yaml") for p in (CHART / "ci").iterdir()), sorted(arguments), "sets of values")
    for name, of_containerd in arguments.items():
        values = yaml.safe_load((CHART / "ci" / f"{name}-values.yaml").read_text())
        report = helm_python.lint(CHART, values, strict=True, namespace=NAMESPACE)
        serious = [m for m in report["messages"] if m["severity"] > 1]
        equal((report["errors"], serious), ([], []), f"{name}: lint")
        objects, notes = render(loaded, values)
        kinds = {"DaemonSet", "ServiceAccount"}
        kinds |= {"ConfigMap"} if name == "default-snapshotter" else set()
        kinds |= {"RuntimeClass"} if name == "runtime-class" else set()
        equal(sorted(objects), sorted(kinds), f"{name}: objects")
        image = "lcow-graphdriver:9.9" if name == "default-snapshotter" else f"lcow-graphdriver:{version}"
        installer = dict(INSTALLER)
        if name == "default-snapshotter":
            installer["seLinuxOptions"] = {"type": "spc_t"}
        pod = check_pod(objects["DaemonSet"], name, "install", image, installer)
        expected = {"LCOW_FACES": "containerd", "LCOW_PREFIX": "/opt/lcow", "LCOW_START_LIMIT": "120"}
        if of_containerd:
            expected |= {"LCOW_CONTAINERD_DROP_IN": "/etc/containerd/conf.d"} | of_containerd
        if name == "default-snapshotter":
            expected["LCOW_CONFIG_FILE"] = "/config/config.toml"
            equal(objects["ConfigMap"]["data"], {"config.toml": values["config"]}, f"{name}: configuration")
            equal(pod["imagePullSecrets"], [{"name": "registry"}], f"{name}: secrets")
        if name == "runtime-class":
            expected |= {"LCOW_FACES": "containerd docker", "LCOW_PREFIX": "/usr/local/lcow", "LCOW_START_LIMIT": "30"}
            equal(objects["RuntimeClass"]["handler"], "vhd", f"{name}: handler")
            equal(objects["DaemonSet"]["spec"]["updateStrategy"], {"type": "OnDelete"}, f"{name}: updates")
            equal(pod["nodeSelector"], values["nodeSelector"], f"{name}: nodes")
            equal(pod.get("tolerations"), None, f"{name}: tolerations")
        equal(environment(pod["initContainers"][0]), expected, f"{name}: environment")
        # What install and uninstall read, and what the chart sets.
        script = (DEPLOY / "host" / "install").read_text()
        for variable in expected:
            equal(f"${{{variable}:-" in script, True, f"install reads {variable}")
        equal("being installed as lcow-graphdriver.service" in notes, True, f"{name}: notes")

        removal, notes = render(loaded, {**values, "mode": "uninstall"})
        check_pod(removal["DaemonSet"], f"{name}, uninstall", "uninstall", image, installer)
        equal("is being removed from every node" in notes, True, f"{name}: notes of the removal")
        print(f"helm {name}: ok")

    # The plain manifests and the chart install the same.
    minimal, _ = render(loaded, {"image": {"repository": "lcow-graphdriver"}})
    plain = kustomize("base")["DaemonSet"]["spec"]["template"]["spec"]
    same = minimal["DaemonSet"]["spec"]["template"]["spec"]
    for field in ("priorityClassName", "nodeSelector", "tolerations", "volumes", "terminationGracePeriodSeconds"):
        equal(same[field], plain[field], f"chart and manifests: {field}")
    equal(same["containers"][0]["resources"], plain["containers"][0]["resources"], "chart and manifests: resources")

    good = {"image": {"repository": "lcow-graphdriver"}}
    refused(loaded, {}, "image.repository")
    for wrong, part in (
        ({"mode": "remove"}, "mode"),
        ({"faces": []}, "faces"),
        ({"faces": ["podman"]}, "faces"),
        ({"prefix": "opt"}, "prefix"),
        ({"containerd": {"dropIn": "conf.d"}}, "dropIn"),
        ({"containerd": {"arguments": ["--a b"]}}, "arguments"),
        ({"startLimit": 0}, "startLimit"),
        ({"unknown": 1}, "unknown"),
    ):
        refused(loaded, good | wrong, part)
    print("helm: wrong values are refused")


manifests()
chart(sys.argv[1])
