"""The measuring part of scripts/bench: makes layers, runs rounds in shuffled order, prints Markdown tables.

Every task is timed in a process of its own, from its start to its end, fsync included; what it needs is prepared
before the clock starts and deleted after it stopped. A ratio is the median of a task by the median of its yardstick.
"""

import argparse
import http.client
import io
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import time

QUICK_ROUNDS = 2
ROUNDS = 5
# Tasks slower than this, in seconds, are measured once after the warm-up.
SLOW = 12
# Calls of which the median latency is told.
CALLS = 50
# Large packages of the npm registry: many small files, one of them with tens of thousands in one folder.
NPM = ["@mui/icons-material@6.4.0", "@mui/material@6.4.0", "react@18.3.1", "react-dom@18.3.1", "typescript@5.7.3",
       "date-fns@4.1.0", "lodash@4.17.21", "rxjs@7.8.1", "core-js@3.40.0", "aws-sdk@2.1692.0"]
MIB = 1 << 20


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def run(*command, **options):
    subprocess.run([str(c) for c in command], check=True, **options)


# ---- layers

def add(tar, name, data=b"", kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mtime = len(data), kind, 1_700_000_000
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    tar.addfile(info, io.BytesIO(data))


def generated_small(path, files):
    rng = random.Random(1)
    pool = rng.randbytes(MIB)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "icons/", kind=tarfile.DIRTYPE)
        for n in range(files):
            at, size = rng.randrange(MIB // 2), min(int(rng.lognormvariate(7.0, 0.8)), MIB // 2)
            add(tar, f"icons/Icon{n:06}.js", pool[at:at + size])


def generated_mixed(path):
    rng = random.Random(2)
    pool = rng.randbytes(2 * MIB)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for d in range(300):
            add(tar, f"usr/lib/d{d:03}/", kind=tarfile.DIRTYPE)
            for n in range(20):
                at, size = rng.randrange(MIB), min(int(rng.lognormvariate(8.5, 1.6)), MIB)
                add(tar, f"usr/lib/d{d:03}/f{n:02}", pool[at:at + size])


def generated_big(path, files, size):
    rng = random.Random(3)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for n in range(files):
            add(tar, f"big{n}.bin", rng.randbytes(size))


def tar_of(tree, path):
    run("tar", "--sort=name", "--numeric-owner", "-C", tree, "-cf", f"{path}.new", ".")
    os.rename(f"{path}.new", path)


def make_layers(folder, quick, only):
    """Layers by name: (path of the tar, what it is)."""
    os.makedirs(folder, exist_ok=True)
    layers = {}

    def layer(name, key, text, make):
        path = os.path.join(folder, f"{key}.tar")
        if name not in only:
            return
        if not os.path.exists(path):
            say(f"making layer {key}")
            make(path)
        layers[name] = (path, text)

    if quick:
        layer("minbase", "quick-mixed", "generated: 6,000 files in 300 folders", generated_mixed)
        layer("small", "quick-small", "generated: 43,000 files in one folder",
              lambda p: generated_small(p, 43_000))
        layer("big", "quick-big", "generated: 4 files of 32 MiB", lambda p: generated_big(p, 4, 32 * MIB))
        return layers

    suite = next((line.split("=")[1].strip().strip('"') for line in open("/etc/os-release")
                  if line.startswith("VERSION_CODENAME=")), "stable")

    def minbase(path):
        tree = os.path.join(folder, "minbase.tree")
        shutil.rmtree(tree, ignore_errors=True)
        run("debootstrap", "--variant=minbase", suite, tree, stdout=subprocess.DEVNULL)
        tar_of(tree, path)
        shutil.rmtree(tree)

    def npm(path):
        tree = os.path.join(folder, "npm.tree")
        shutil.rmtree(tree, ignore_errors=True)
        os.makedirs(tree)
        with open(os.path.join(tree, "package.json"), "w") as package:
            package.write('{"name":"layer","version":"1.0.0","private":true}')
        run("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *NPM, cwd=tree,
            stdout=subprocess.DEVNULL)
        tar_of(tree, path)
        shutil.rmtree(tree)

    layer("minbase", "minbase", f"debootstrap --variant=minbase {suite}", minbase)
    if shutil.which("npm"):
        layer("small", "small", f"node_modules of {len(NPM)} packages of the npm registry", npm)
    else:
        layer("small", "generated-small", "generated: 43,000 files in one folder (there is no npm here)",
              lambda p: generated_small(p, 43_000))
    layer("big", "big", "generated: 8 files of 80 MiB", lambda p: generated_big(p, 8, 80 * MIB))
    return layers


def facts(path):
    """Bytes, entries, and the most names in one folder of a tar."""
    entries, folders = 0, {}
    names = subprocess.run(["tar", "-tf", path], check=True, stdout=subprocess.PIPE).stdout.splitlines()
    for name in names:
        entries += 1
        parent = os.path.dirname(name.rstrip(b"/"))
        folders[parent] = folders.get(parent, 0) + 1
    return os.path.getsize(path), entries, max(folders.values(), default=0)


# ---- tasks

def shell(script, **names):
    """Runs a script, its time in seconds."""
    begin = time.monotonic()
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, env={**os.environ, **{k: str(v) for k, v in names.items()}})
    elapsed = time.monotonic() - begin
    if done.returncode != 0:
        raise RuntimeError(f"failed: {script}\n{done.stderr.decode(errors='replace')}")
    return elapsed


def fresh(*paths):
    for path in paths:
        if os.path.exists(path):
            os.unlink(path)


class Place:
    """A folder on one file system, and the tasks in it on one layer."""

    def __init__(self, folder, program, tar, size, entries, tree):
        self.names = dict(P=program, TAR=tar, TREE=tree, F=folder, IMG=f"{folder}/layer.vhd",
                          REC=f"{folder}/layer.rec", OUT=f"{folder}/out", MNT=f"{folder}/mnt",
                          # Room for inodes, slack of blocks, and the file system's own.
                          SIZE=(size * 3 // 2 + entries * 1024 + 64 * MIB) // MIB * MIB,
                          INODES=entries + entries // 8 + 2048)
        os.makedirs(f"{folder}/mnt", exist_ok=True)
        run(program, "layer", "pack", "--record", self.names["REC"], tar, self.names["IMG"],
            stdout=subprocess.DEVNULL)

    def task(self, script):
        def measured():
            fresh(self.names["OUT"], self.names["OUT"] + ".rec")
            try:
                return shell(script, **self.names)
            finally:
                subprocess.run(["umount", self.names["MNT"]], stderr=subprocess.DEVNULL)
                fresh(self.names["OUT"], self.names["OUT"] + ".rec")
        return measured

    def tasks(self):
        return {
            "cat": self.task('cat "$TAR" >"$OUT"; sync "$OUT"'),
            "pack": self.task('"$P" layer pack --record "$OUT.rec" "$TAR" "$OUT"'),
            "mke2fs": self.task('truncate -s "$SIZE" "$OUT"; mke2fs -q -F -t ext4 -N "$INODES" -d "$TREE" "$OUT"; '
                                'sync "$OUT"'),
            "mount": self.task('truncate -s "$SIZE" "$OUT"; mkfs.ext4 -q -F -N "$INODES" "$OUT"; '
                               'mount -o loop "$OUT" "$MNT"; tar -C "$MNT" -xf "$TAR"; umount "$MNT"; sync "$OUT"'),
            "catcat": self.task('cat "$IMG" | cat >/dev/null'),
            "exact": self.task('"$P" layer unpack --exact "$REC" "$IMG" - | cat >/dev/null'),
            "canonical": self.task('"$P" layer unpack "$IMG" - | cat >/dev/null'),
            "gnutar": self.task('mount -o loop,ro "$IMG" "$MNT"; tar -C "$MNT" -c . | cat >/dev/null; '
                                'umount "$MNT"'),
            "find": self.task('mount -o loop,ro "$IMG" "$MNT"; find "$MNT" -printf "%s %T@ %p\\n" >/dev/null; '
                              'umount "$MNT"'),
        }


def rounds(tasks, count):
    """Medians by name; each round in an order of its own, after one that does not count."""
    times = {name: [] for name in tasks}
    once = set()
    for name, task in tasks.items():
        if task() > SLOW:
            once.add(name)
    for n in range(count):
        order = [name for name in tasks if n == 0 or name not in once]
        random.shuffle(order)
        for name in order:
            times[name].append(tasks[name]())
    return {name: statistics.median(t) for name, t in times.items()}


def peak_memory(program, tar, folder):
    """Peak resident bytes of `layer pack`, and its entries as it counts them."""
    out = f"{folder}/out"
    fresh(out)
    with open(f"{folder}/json", "w+") as result:
        child = subprocess.Popen([program, "layer", "pack", "--json", tar, out], stdout=result)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = status
        result.seek(0)
        entries = json.load(result)["entries"]
    fresh(out)
    return usage.ru_maxrss * 1024, entries


# ---- through the plugin

class Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


class Plugin:
    def __init__(self, program, folder):
        self.folder, self.socket = folder, f"{folder}/s"
        os.makedirs(folder, exist_ok=True)
        self.log = open(f"{folder}/log", "w")
        self.child = subprocess.Popen([program, "serve", "--root", f"{folder}/root", "--socket", self.socket],
                                      stdout=self.log, stderr=self.log)
        for _ in range(200):
            if os.path.exists(self.socket):
                break
            time.sleep(0.05)
        self.connection = Connection(self.socket)
        self.call("Init", Home=f"{folder}/home", Opts=[])

    def call(self, method, **request):
        self.connection.request("POST", f"/GraphDriver.{method}", json.dumps(request))
        reply = self.connection.getresponse()
        body = reply.read()
        if reply.status != 200 or (body[:1] == b"{" and json.loads(body).get("Err")):
            raise RuntimeError(f"{method} {request}: {body[:500]!r}")
        return body

    def timed(self, method, **request):
        begin = time.monotonic()
        self.call(method, **request)
        return time.monotonic() - begin

    def stop(self):
        self.connection.close()
        self.child.terminate()
        self.child.wait(30)
        self.log.close()


def plugin_tasks(plugin, tar):
    names = dict(SOCK=plugin.socket, TAR=tar)
    plugin.call("Create", ID="bench", Parent="")
    curl = 'curl -sSf --unix-socket "$SOCK"'
    apply_script = (f'{curl} -H Expect: -X POST -T "$TAR" '
                    '"http://localhost/GraphDriver.ApplyDiff?id=$ID&parent="')
    shell(apply_script, ID="bench", **names)
    count = [0]

    def apply():
        count[0] += 1
        identity = f"apply{count[0]}"
        plugin.call("Create", ID=identity, Parent="")
        try:
            return shell(apply_script, ID=identity, **names)
        finally:
            plugin.call("Remove", ID=identity)

    return {
        "http apply": apply,
        "http diff": lambda: shell(f"""{curl} -d '{{"ID":"bench","Parent":""}}' """
                                   'http://localhost/GraphDriver.Diff | cat >/dev/null', **names),
        "DiffSize": lambda: plugin.timed("DiffSize", ID="bench", Parent=""),
        "Changes": lambda: plugin.timed("Changes", ID="bench", Parent=""),
    }


def latencies(plugin):
    """Medians of calls on a layer that is there, in seconds."""
    result = {}
    result["CreateReadWrite"] = [plugin.timed("CreateReadWrite", ID=f"rw{n}", Parent="bench", MountLabel="",
                                              StorageOpt={}) for n in range(CALLS)]
    cold = []
    for n in range(CALLS):
        cold.append(plugin.timed("Get", ID=f"rw{n}", MountLabel=""))
        plugin.call("Put", ID=f"rw{n}")
    result["Get, its layer not yet mounted"] = cold
    plugin.call("Get", ID="bench", MountLabel="")
    warm, put = [], []
    for n in range(CALLS):
        warm.append(plugin.timed("Get", ID=f"rw{n}", MountLabel=""))
        put.append(plugin.timed("Put", ID=f"rw{n}"))
    result["Get, its layer mounted"] = warm
    result["Put"] = put
    plugin.call("Put", ID="bench")
    result["Remove"] = [plugin.timed("Remove", ID=f"rw{n}") for n in range(CALLS)]
    return {name: statistics.median(times) for name, times in result.items()}


# ---- tables

def table(out, title, head, rows):
    out.append(f"\n### {title}\n")
    out.append("| " + " | ".join(head) + " |")
    out.append("|" + "|".join(["---"] * 2 + ["---:"] * (len(head) - 2)) + "|")
    out.extend("| " + " | ".join(row) + " |" for row in rows)


def ratio(value, base):
    return "–" if value is None else f"{value / base:.2f} ({value:.2f} s)" if value >= 0.1 else \
        f"{value / base:.2f} ({value * 1000:.0f} ms)"


def measure_place(place, folder, options, layers, known, tree_of):
    """All figures of one file system: by layer, and the latencies."""
    figures, calls = {}, {}
    for name, (tar, _) in layers.items():
        work = f"{folder}/{name}"
        os.makedirs(work)
        size, entries, _ = known[name]
        say(f"{place}, {name}")
        plugin = Plugin(options.program, f"{work}/plugin")
        try:
            tasks = Place(work, options.program, tar, size, entries, tree_of[name]).tasks()
            tasks.update(plugin_tasks(plugin, tar))
            figures[name] = rounds(tasks, options.rounds)
            if not calls:
                calls = latencies(plugin)
            figures[name]["image"] = os.path.getsize(f"{work}/layer.vhd")
            figures[name]["record"] = os.path.getsize(f"{work}/layer.rec")
        finally:
            plugin.stop()
            subprocess.run(["umount", f"{work}/mnt"], stderr=subprocess.DEVNULL)
        shutil.rmtree(work)
    return figures, calls


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--out")
    parser.add_argument("--only", default="minbase,small,big")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.dir = os.path.abspath(options.dir)
    layers = make_layers(f"{options.dir}/layers", options.quick, options.only.split(","))
    known = {name: facts(tar) for name, (tar, _) in layers.items()}
    memory = f"/dev/shm/lcow-bench.{os.getpid()}"
    places = {"tmpfs": memory, "disk": f"{options.dir}/run.{os.getpid()}"}
    figures, calls, peaks, tree_of = {}, {}, {}, {}
    try:
        os.makedirs(memory)
        for name, (tar, _) in layers.items():
            tree_of[name] = f"{memory}/tree.{name}"
            os.makedirs(tree_of[name])
            run("tar", "-C", tree_of[name], "-xf", tar)
            peaks[name] = peak_memory(options.program, tar, memory)
        for place, folder in places.items():
            os.makedirs(folder, exist_ok=True)
            figures[place], calls[place] = measure_place(place, folder, options, layers, known, tree_of)
    finally:
        for folder in places.values():
            shutil.rmtree(folder, ignore_errors=True)

    out = []
    table(out, "The layers", ["layer", "what", "tar", "entries", "most names in a folder", "image × tar",
                              "record × tar", "peak memory of pack", "above 8 MB, by entry"],
          [[name, layers[name][1], f"{size / 1e6:.0f} MB", f"{entries:,}", f"{most:,}",
            f"{figures['tmpfs'][name]['image'] / size:.2f}", f"{figures['tmpfs'][name]['record'] / size:.4f}",
            f"{peaks[name][0] / 1e6:.0f} MB", f"{max(0, peaks[name][0] - 8e6) / peaks[name][1]:.0f} B"]
           for name, (size, entries, most) in known.items()])
    pairs = [(place, name) for place in places for name in layers]
    table(out, "Tar to image, × `cat tar > file`",
          ["where", "layer", "cat", "`layer pack --record`", "`mke2fs -d`", "mkfs, loop mount, `tar -x`"],
          [[p, n, f"{figures[p][n]['cat'] * 1000:.0f} ms"]
           + [ratio(figures[p][n][k], figures[p][n]["cat"]) for k in ("pack", "mke2fs", "mount")]
           for p, n in pairs])
    table(out, "Image to tar, × `cat image | cat`",
          ["where", "layer", "cat", "`layer unpack --exact`", "`layer unpack`", "loop mount, `tar -c`"],
          [[p, n, f"{figures[p][n]['catcat'] * 1000:.0f} ms"]
           + [ratio(figures[p][n][k], figures[p][n]["catcat"]) for k in ("exact", "canonical", "gnutar")]
           for p, n in pairs])
    table(out, "Through the plugin (HTTP, jailed worker, strict check, commit), × the command on files",
          ["where", "layer", "ApplyDiff × pack", "Diff × unpack --exact"],
          [[p, n, ratio(figures[p][n]["http apply"], figures[p][n]["pack"]),
            ratio(figures[p][n]["http diff"], figures[p][n]["exact"])] for p, n in pairs])
    table(out, "Metadata through the plugin, × loop mount and `find`",
          ["where", "layer", "mount and find", "DiffSize", "Changes"],
          [[p, n, f"{figures[p][n]['find'] * 1000:.0f} ms"]
           + [ratio(figures[p][n][k], figures[p][n]["find"]) for k in ("DiffSize", "Changes")]
           for p, n in pairs])
    first = next(iter(layers))
    table(out, f"Latencies through the socket, medians of {CALLS}, a container on *{first}*",
          ["call", ""] + list(places),
          [[name, ""] + [f"{calls[p][name] * 1000:.2f} ms" for p in places] for name in calls["tmpfs"]])
    text = "\n".join(out).lstrip() + "\n"
    print(text)
    with open(options.out or f"{options.dir}/table.md", "w") as saved:
        saved.write(text)


if __name__ == "__main__":
    main()
