"""The measuring part of scripts/bench: makes layers, runs rounds in shuffled order, prints Markdown tables.

Every task is timed in its own process, from its start to its end, fsync included; its inputs are prepared before the
clock starts and deleted after it has stopped. A ratio is the median of a task by the median of its yardstick.
Processor time (user and system, of all processes of the task) is shown beside the time: it does not change when other
programs compete for the cores, while the time of a task on two cores then suffers more than that of a copy.
"""

import argparse
import concurrent.futures
import http.client
import io
import json
import os
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import time

QUICK_ROUNDS = 2
ROUNDS = 5
# Snapshots in the store whose start and List are measured.
QUICK_SNAPSHOTS = 1_000
SNAPSHOTS = 10_000
# Tasks slower than this, in seconds, run only once: warming up gains them nothing.
SLOW = 20
# Number of calls per median latency.
CALLS = 50
# Large packages of the npm registry: many small files, one of them with tens of thousands in one directory.
NPM = ["@mui/icons-material@6.4.0", "@mui/material@6.4.0", "react@18.3.1", "react-dom@18.3.1", "typescript@5.7.3",
       "date-fns@4.1.0", "lodash@4.17.21", "rxjs@7.8.1", "core-js@3.40.0", "aws-sdk@2.1692.0"]
# Packages that turn a base system into one for building programs.
TOOLCHAIN = "g++,make,python3,git,perl"
# Layers of the image that is applied one after the other, as dockerd does in a pull, and then two at once.
PULLED = 20
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
        for parent in ("usr/", "usr/lib/"):
            add(tar, parent, kind=tarfile.DIRTYPE)
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
        layer("minbase", "quick-mixed", "generated: 6,000 files in 300 directories", generated_mixed)
        layer("small", "quick-small", "generated: 43,000 files in one directory",
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

    def toolchain(path):
        tree = os.path.join(folder, "toolchain.tree")
        shutil.rmtree(tree, ignore_errors=True)
        run("debootstrap", "--variant=minbase", f"--include={TOOLCHAIN}", suite, tree, stdout=subprocess.DEVNULL)
        tar_of(tree, path)
        shutil.rmtree(tree)

    layer("minbase", "minbase", f"debootstrap --variant=minbase {suite}", minbase)
    layer("toolchain", "toolchain", f"the same with {TOOLCHAIN.replace(',', ', ')}", toolchain)
    if shutil.which("npm"):
        layer("small", "small", f"node_modules of {len(NPM)} packages of the npm registry", npm)
    else:
        layer("small", "generated-small", "generated: 43,000 files in one directory (there is no npm here)",
              lambda p: generated_small(p, 43_000))
    layer("big", "big", "generated: 8 files of 80 MiB", lambda p: generated_big(p, 8, 80 * MIB))
    return layers


def facts(path):
    """Bytes, entries, and the most names in one directory of a tar."""
    entries, folders = 0, {}
    names = subprocess.run(["tar", "-tf", path], check=True, stdout=subprocess.PIPE).stdout.splitlines()
    for name in names:
        entries += 1
        parent = os.path.dirname(name.rstrip(b"/"))
        folders[parent] = folders.get(parent, 0) + 1
    return os.path.getsize(path), entries, max(folders.values(), default=0)


# ---- tasks

def processor():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def shell(script, **names):
    """Runs a script; its time and its processor time in seconds."""
    before, begin = processor(), time.monotonic()
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, env={**os.environ, **{k: str(v) for k, v in names.items()}})
    elapsed = time.monotonic() - begin
    if done.returncode != 0:
        raise RuntimeError(f"failed: {script}\n{done.stderr.decode(errors='replace')}")
    return elapsed, processor() - before


def fresh(*paths):
    for path in paths:
        if os.path.exists(path):
            os.unlink(path)


class Place:
    """A directory on one file system, and the tasks in it on one layer."""

    def __init__(self, folder, options, tar, size, entries, tree):
        program = options.program
        self.reads_tar = options.mke2fs is not None
        self.names = dict(P=program, TAR=tar, TREE=tree, F=folder, MKE2FS=options.mke2fs or "", IMG=f"{folder}/layer.vhd",
                          REC=f"{folder}/layer.rec", OUT=f"{folder}/out", MNT=f"{folder}/mnt",
                          # Space for inodes, unused ends of blocks, and metadata.
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
        tasks = {
            "cat": self.task('cat "$TAR" >"$OUT"; sync "$OUT"'),
            "pack": self.task('"$P" layer pack --record "$OUT.rec" "$TAR" "$OUT"'),
            "pack stream": self.task('cat "$TAR" | "$P" layer pack --record "$OUT.rec" - "$OUT"'),
            "pack verity": self.task('"$P" layer pack --verity --record "$OUT.rec" "$TAR" "$OUT"'),
            "catcp": self.task('cat "$TAR" | cat >"$OUT"; sync "$OUT"'),
            "rw": self.task('dd if="$TAR" of="$OUT" bs=256K status=none; sync "$OUT"'),
            "mke2fs": self.task('truncate -s "$SIZE" "$OUT"; mke2fs -q -F -t ext4 -N "$INODES" -d "$TREE" "$OUT"; '
                                'sync "$OUT"'),
            # From 1.47.1 on it reads a tar itself: a newer one is unpacked beside the machine's own.
            "mke2fs tar": self.task('truncate -s "$SIZE" "$OUT"; '
                                    'LD_LIBRARY_PATH="$MKE2FS/lib/$(uname -m)-linux-gnu" "$MKE2FS/sbin/mke2fs" -q -F -t ext4 -N "$INODES" -d "$TAR" "$OUT"; sync "$OUT"'),
            "mount": self.task('truncate -s "$SIZE" "$OUT"; mkfs.ext4 -q -F -N "$INODES" "$OUT"; '
                               'mount -o loop "$OUT" "$MNT"; tar -C "$MNT" -xf "$TAR"; umount "$MNT"; sync "$OUT"'),
            "mount bsdtar": self.task('truncate -s "$SIZE" "$OUT"; mkfs.ext4 -q -F -N "$INODES" "$OUT"; '
                                      'mount -o loop "$OUT" "$MNT"; bsdtar -C "$MNT" -xpf "$TAR"; umount "$MNT"; '
                                      'sync "$OUT"'),
            "catcat": self.task('cat "$IMG" | cat >/dev/null'),
            "exact": self.task('"$P" layer unpack --exact "$REC" "$IMG" - | cat >/dev/null'),
            "canonical": self.task('"$P" layer unpack "$IMG" - | cat >/dev/null'),
            "gnutar": self.task('mount -o loop,ro "$IMG" "$MNT"; tar -C "$MNT" -c . | cat >/dev/null; '
                                'umount "$MNT"'),
            "bsdtar": self.task('mount -o loop,ro "$IMG" "$MNT"; bsdtar -C "$MNT" -cf - . | cat >/dev/null; '
                                'umount "$MNT"'),
            "find": self.task('mount -o loop,ro "$IMG" "$MNT"; find "$MNT" -printf "%s %T@ %p\\n" >/dev/null; '
                              'umount "$MNT"'),
        }
        if not self.reads_tar:
            del tasks["mke2fs tar"]
        return tasks


def rounds(tasks, count):
    """Medians by name (time, processor time); each round in its own order, after a warm-up round."""
    times = {name: [] for name in tasks}
    for name, task in tasks.items():
        first = task()
        if first[0] > SLOW:
            times[name].append(first)
    order = [name for name in tasks if not times[name]]
    for _ in range(count):
        random.shuffle(order)
        for name in order:
            times[name].append(tasks[name]())
    return {name: tuple(statistics.median(of) for of in zip(*t)) for name, t in times.items()}


# Run by a small interpreter: a process starts with its parent's peak.
PEAK = """import os, resource, sys
status = os.spawnv(os.P_WAIT, sys.argv[1], sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(status)"""


def peak_memory(program, tar, folder):
    """Peak resident bytes of `layer pack --record`, and its entries as it counts them."""
    out = f"{folder}/out"
    command = [sys.executable, "-I", "-S", "-c", PEAK, program, "layer", "pack", "--json", "--record", f"{out}.rec",
               tar, out]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode()
    fresh(out, f"{out}.rec")
    summary, _, peak = told.rstrip().rpartition("\n")
    return int(peak), json.loads(summary)["entries"]


# ---- through the plugin

class Connection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost")
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self.path)


class Plugin:
    def __init__(self, program, folder, *arguments):
        self.folder, self.socket = folder, f"{folder}/s"
        os.makedirs(folder, exist_ok=True)
        self.log = open(f"{folder}/log", "w")
        self.child = subprocess.Popen([program, "serve", "--root", f"{folder}/root", "--socket", self.socket,
                                       *arguments],
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
        "DiffSize": lambda: (plugin.timed("DiffSize", ID="bench", Parent=""), 0),
        "Changes": lambda: (plugin.timed("Changes", ID="bench", Parent=""), 0),
    }


def latencies(plugin):
    """Medians of calls on an existing layer, in seconds."""
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


def blanks(program, folder):
    """CreateReadWrite of a sandbox for virtual machines, a blank ext4 of 20 GB in a VHDX: seconds, bytes on the disk."""
    plugin = Plugin(program, folder, "--storage-opt", "lcow.mount=none")
    try:
        plugin.call("Create", ID="base", Parent="")
        times = [plugin.timed("CreateReadWrite", ID=f"rw{n}", Parent="base", MountLabel="", StorageOpt={})
                 for n in range(CALLS)]
        return statistics.median(times), os.stat(f"{folder}/home/rw0/sandbox.vhdx").st_blocks * 512
    finally:
        plugin.stop()


def pulls(plugin, folder):
    """Applies an image of PULLED layers, one after the other as dockerd does, and the same layers by two at once.

    The layers are alike, 20 MB of generated files each. Seconds of both.
    """
    tar = f"{folder}/part.tar"
    generated_small(tar, 8_000)
    url = "http://localhost/GraphDriver.ApplyDiff?id=$ID&parent="

    def apply(identity):
        subprocess.run(["curl", "-sSf", "--unix-socket", plugin.socket, "-H", "Expect:", "-X", "POST", "-T", tar,
                        url.replace("$ID", identity)], check=True, stdout=subprocess.DEVNULL)

    found = {}
    for at_once in (1, 2):
        names = [f"pull{at_once}x{n}" for n in range(PULLED)]
        for name in names:
            plugin.call("Create", ID=name, Parent="")
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(at_once) as workers:
            list(workers.map(apply, names))
        found[at_once] = time.monotonic() - begin
        for name in names:
            plugin.call("Remove", ID=name)
    # What two processors gain on this machine: a checksum of the same bytes, by one process and by two at once.
    def digest(_):
        subprocess.run(["sha256sum", *[tar] * PULLED], check=True, stdout=subprocess.DEVNULL)
    begin = time.monotonic()
    digest(0), digest(0)
    one = time.monotonic() - begin
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as workers:
        list(workers.map(digest, range(2)))
    found["processors"] = one / (time.monotonic() - begin)
    os.unlink(tar)
    return found


# ---- tables

# Columns: tasks by name, and what they are.
PACKERS = {"pack": "`layer pack --record`", "pack stream": "the same from a pipe", "pack verity": "with `--verity`",
           "rw": "`dd bs=256K`", "catcp": "`cat tar` into `cat > file`",
           "mke2fs": "`mke2fs -d` folder", "mke2fs tar": "`mke2fs -d` tar",
           "mount": "mkfs, loop mount, `tar -x`", "mount bsdtar": "mkfs, loop mount, `bsdtar -x`"}
UNPACKERS = {"exact": "`layer unpack --exact`", "canonical": "`layer unpack`", "gnutar": "loop mount, `tar -c`",
             "bsdtar": "loop mount, `bsdtar -c`"}


def plot(folder, figures, place):
    """An SVG for each direction: times × copying, a group of bars for each layer."""
    import matplotlib
    matplotlib.use("svg")
    # The same figures give the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": "lcow", "font.size": 9})
    from matplotlib import pyplot
    for name, columns, base in (("apply", PACKERS, "cat"), ("diff", UNPACKERS, "catcat")):
        layers = [layer for layer in figures if figures[layer].get(base)]
        shown = [key for key in columns if any(figures[layer].get(key) for layer in layers)]
        if not shown:
            continue
        plane, axes = pyplot.subplots(figsize=(8, 3.6))
        width = 0.8 / len(shown)
        for n, key in enumerate(shown):
            at = [i for i, layer in enumerate(layers) if figures[layer].get(key)]
            values = [figures[layers[i]][key][0] / figures[layers[i]][base][0] for i in at]
            bars = axes.bar([i + (n + 0.5) * width - 0.4 for i in at], values, width, label=columns[key].replace("`", ""))
            axes.bar_label(bars, fmt="%.1f", fontsize=6)
        axes.set_yscale("log")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(layers)), layers)
        axes.set_ylabel("time × cat")
        axes.set_title({"apply": "tar to image", "diff": "image to tar"}[name] + f", {place}")
        axes.legend(fontsize=7, ncols=2)
        plane.tight_layout()
        plane.savefig(f"{folder}/performance-{name}.svg", metadata={"Date": None})
        pyplot.close(plane)


def table(out, title, head, rows):
    # With --tasks, some tables are empty.
    rows = [row for row in rows if any(cell != "–" for cell in row[2:])]
    if not rows:
        return
    out.append(f"\n### {title}\n")
    out.append("| " + " | ".join(head) + " |")
    out.append("|" + "|".join(["---"] * 2 + ["---:"] * (len(head) - 2)) + "|")
    out.extend("| " + " | ".join(row) + " |" for row in rows)


def span(seconds):
    if seconds is None:
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else \
        f"{seconds * 1000:.1f} ms"


def ratio(value, base, with_processor=True):
    if not value or not base:
        return "–"
    text = f"{value[0] / base[0]:.2f}" if value[0] > base[0] / 100 else f"{value[0] / base[0]:.4f}"
    text += f" ({span(value[0])})"
    return text + (f" · {value[1] / base[1]:.2f}" if with_processor else "")


def measure_place(place, folder, options, layers, known, tree_of, sizes):
    """All figures of one file system: by layer, and the latencies."""
    figures, calls, pulled = {}, {}, {}
    for name, (tar, _) in layers.items():
        work = f"{folder}/{name}"
        os.makedirs(work)
        size, entries, _ = known[name]
        say(f"{place}, {name}")
        plugin = Plugin(options.program, f"{work}/plugin")
        try:
            tasks = Place(work, options, tar, size, entries, tree_of[name]).tasks()
            tasks.update(plugin_tasks(plugin, tar))
            wanted = {task: f for task, f in tasks.items() if not options.tasks or task in options.tasks}
            figures[name] = rounds(wanted, options.rounds)
            if not calls and not options.tasks:
                calls = latencies(plugin)
                calls["CreateReadWrite with lcow.mount=none: a VHDX of 20 GB"], blank = blanks(
                    options.program, f"{work}/none")
                say(f"{place}: a blank VHDX of 20 GB takes {blank:,} bytes")
                sizes[place] = blank
            if not pulled and (not options.tasks or "pull" in options.tasks):
                pulled = pulls(plugin, work)
            figures[name]["image"] = os.path.getsize(f"{work}/layer.vhd")
            figures[name]["record"] = os.path.getsize(f"{work}/layer.rec")
        finally:
            plugin.stop()
            subprocess.run(["umount", f"{work}/mnt"], stderr=subprocess.DEVNULL)
        shutil.rmtree(work)
    return figures, calls, pulled


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program")
    parser.add_argument("--containerd", action="store_true", help="only make layers; print arguments of benches/containerd.rs")
    parser.add_argument("--engine", action="store_true", help="only make layers; print arguments of benches/engine.rs")
    parser.add_argument("--dir", required=True)
    parser.add_argument("--mke2fs", help="directory of an unpacked mke2fs that reads tars (1.47.1 or later)")
    parser.add_argument("--out")
    parser.add_argument("--only")
    parser.add_argument("--tasks", type=lambda names: names.split(","), default=[])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--plots")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.dir = os.path.abspath(options.dir)
    # The first layer of an engine's image has a shell and python3.
    options.only = options.only or ("toolchain,small,big" if options.engine else "minbase,toolchain,small,big")
    layers = make_layers(f"{options.dir}/layers", options.quick, options.only.split(","))
    if options.engine:
        print("--rounds", options.rounds, "--out", os.path.abspath(options.out or f"{options.dir}/engine.md"), sep="\n")
        if options.tasks:
            print("--only", ",".join(options.tasks), sep="\n")
        print(*(f"{name}={tar}" for name, (tar, _) in layers.items()), sep="\n")
        return
    if options.containerd:
        out = os.path.abspath(options.out or f"{options.dir}/containerd.md")
        snapshots = QUICK_SNAPSHOTS if options.quick else SNAPSHOTS
        print("--rounds", options.rounds, "--snapshots", snapshots, "--out", out, sep="\n")
        print(*(f"{name}={tar}" for name, (tar, _) in layers.items()), sep="\n")
        return
    known = {name: facts(tar) for name, (tar, _) in layers.items()}
    memory = f"/dev/shm/lcow-bench.{os.getpid()}"
    places = {"tmpfs": memory, "disk": f"{options.dir}/run.{os.getpid()}"}
    figures, calls, pulled, peaks, tree_of, sizes = {}, {}, {}, {}, {}, {}
    try:
        os.makedirs(memory)
        for name, (tar, _) in layers.items():
            tree_of[name] = f"{memory}/tree.{name}"
            os.makedirs(tree_of[name])
            run("tar", "-C", tree_of[name], "-xf", tar)
            peaks[name] = peak_memory(options.program, tar, memory)
        for place, folder in places.items():
            os.makedirs(folder, exist_ok=True)
            figures[place], calls[place], pulled[place] = measure_place(place, folder, options, layers, known, tree_of,
                                                                        sizes)
    finally:
        for folder in places.values():
            shutil.rmtree(folder, ignore_errors=True)

    out = []
    table(out, "The layers", ["layer", "contents", "tar", "entries", "most names in a directory", "image × tar",
                              "record × tar", "peak memory of pack", "above 8 MB, per entry"],
          [[name, layers[name][1], f"{size / 1e6:.0f} MB", f"{entries:,}", f"{most:,}",
            f"{figures['tmpfs'][name]['image'] / size:.2f}", f"{figures['tmpfs'][name]['record'] / size:.4f}",
            f"{peaks[name][0] / 1e6:.0f} MB", f"{max(0, peaks[name][0] - 8e6) / peaks[name][1]:.0f} B"]
           for name, (size, entries, most) in known.items()])
    pairs = [(place, name) for place in places for name in layers]
    table(out, "Tar to image, × `cat tar > file` (time) · × its processor time",
          ["where", "layer", "cat"] + list(PACKERS.values()),
          [[p, n, span(figures[p][n].get('cat', [None])[0])]
           + [ratio(figures[p][n].get(k), figures[p][n].get("cat")) for k in PACKERS]
           for p, n in pairs])
    table(out, "Image to tar, × `cat image | cat` (time) · × its processor time",
          ["where", "layer", "cat"] + list(UNPACKERS.values()),
          [[p, n, span(figures[p][n].get('catcat', [None])[0])]
           + [ratio(figures[p][n].get(k), figures[p][n].get("catcat")) for k in UNPACKERS]
           for p, n in pairs])
    table(out, "HTTP, jailed worker, strict check and commit, × the command on files",
          ["where", "layer", "ApplyDiff × pack", "Diff × unpack --exact"],
          [[p, n, ratio(figures[p][n].get("http apply"), figures[p][n].get("pack"), False),
            ratio(figures[p][n].get("http diff"), figures[p][n].get("exact"), False)] for p, n in pairs])
    table(out, "Metadata through the plugin, × loop mount and `find`",
          ["where", "layer", "mount and find", "DiffSize", "Changes"],
          [[p, n, span(figures[p][n].get('find', [None])[0])]
           + [ratio(figures[p][n].get(k), figures[p][n].get("find"), False) for k in ("DiffSize", "Changes")]
           for p, n in pairs])
    first = next(iter(layers))
    table(out, f"Latencies through the socket, medians of {CALLS}, a container on *{first}*",
          ["call", ""] + list(places),
          [[name, ""] + [f"{calls[p][name] * 1000:.2f} ms" for p in places] for name in calls["tmpfs"]])
    if sizes:
        out.append("That VHDX takes on the disk: " + ", ".join(f"{n / 1e6:.2f} MB ({p})" for p, n in sizes.items()) + ".")
    table(out, f"{PULLED} layers of {8_000:,} small files through the plugin",
          ["where", "", "one after the other", "two at once", "gain", "two `sha256sum` at once gain"],
          [[p, "", span(f[1]), span(f[2]), f"{f[1] / f[2]:.2f}", f"{f['processors']:.2f}"]
           for p, f in pulled.items() if f])
    if options.plots:
        plot(options.plots, figures["tmpfs"], "tmpfs")
    text = "\n".join(out).lstrip() + "\n"
    print(text)
    with open(options.out or f"{options.dir}/table.md", "w") as saved:
        saved.write(text)


if __name__ == "__main__":
    main()
