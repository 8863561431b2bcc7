"""What the trials of this directory share: nodes, guests, and what is known of where a guest runs.

A guest prints heartbeats, a number each, to a file of the node on which it runs. A thread looks at the
files of both nodes all the time: it knows which of them grew last, and how often that changed.
"""

import datetime
import importlib.machinery
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
loader = importlib.machinery.SourceFileLoader("lab", str(HERE / "lab"))
lab = importlib.util.module_from_spec(importlib.util.spec_from_loader("lab", loader))
loader.exec_module(lab)

# Longer than any step takes, also on a machine that does other things.
PATIENCE = 180


# The folder of a node in which a guest's output is.
BEAT = "beat"


def vm_config(name, region_mib=16):
    """A guest that writes to `region_mib` of its memory, and counts in it."""
    return {
        "payload": {
            "kernel": "/srv/vms/pocket.elf",
            "cmdline": f"workload=dirty region_mib={region_mib} rate=500 order=scattered heartbeat_ms=20",
        },
        "memory": {"size": 64 << 20},
        "disks": [{"path": f"/srv/vms/{name}.raw"}],
        "serial": {"mode": "File", "file": f"/srv/vms/beat/{name}"},
        "console": {"mode": "Off"},
    }


FENCING = f"""
property stonith-enabled=true stonith-action=off start-failure-is-fatal=false
rsc_defaults resource-stickiness=100
primitive off-n1 stonith:fence_lab params plug=n1 pcmk_host_list=n1 pcmk_host_check=static-list
primitive off-n2 stonith:fence_lab params plug=n2 pcmk_host_list=n2 pcmk_host_check=static-list
location off-n1-elsewhere off-n1 -inf: n1
location off-n2-elsewhere off-n2 -inf: n2
primitive whimbrel ocf:whimbrel:host \\
  params allow=/srv/vms insecure=true retry_after=5 \\
  op start timeout=60s interval=0 op stop timeout=120s interval=0 op monitor interval=5s timeout=30s
clone whimbrel-clone whimbrel meta interleave=true
"""


def vm_resource(name, parameters):
    """A VM's resource, placed where its service runs."""
    return f"""
primitive {name} ocf:whimbrel:vm \\
  params config=/srv/vms/{name}.json insecure=true shutdown_timeout=0 {parameters} \\
  op start timeout=60s interval=0 op stop timeout=90s interval=0 op monitor interval=5s timeout=30s \\
  op migrate_to timeout=300s interval=0 on-fail=block op migrate_from timeout=60s interval=0 \\
  meta allow-migrate=true multiple-active=stop_unexpected
order {name}-after-whimbrel inf: whimbrel-clone {name}
colocation {name}-with-whimbrel inf: {name} whimbrel-clone
"""


def boot(kernel, names=("vm1",), parameters="max_bandwidth=8M"):
    """Loads the cluster's configuration, with VMs of these names. At the default bandwidth a migration of 16 MiB takes
    2 s, which is time enough for faults."""
    (lab.STATE / "shared/pocket.elf").write_bytes(pathlib.Path(kernel).read_bytes())
    for name in names:
        with open(lab.STATE / f"shared/{name}.raw", "wb") as disk:
            disk.truncate(16 << 20)
        (lab.STATE / f"shared/{name}.json").write_text(json.dumps(vm_config(name)))
    text = FENCING + "".join(vm_resource(name, parameters) for name in names)
    (lab.STATE / "shared/cluster.crm").write_text(text)
    node("n1", "crm", "-F", "configure", "load", "update", "/srv/vms/cluster.crm")


def node(name, *words, check=True):
    asked = subprocess.run(lab.in_node(name, list(words)), capture_output=True, text=True, check=False)
    if check and asked.returncode != 0:
        raise SystemExit(f"{name}: {' '.join(words)}: {asked.stdout}{asked.stderr}")
    return asked.stdout


def other(name):
    return next(one for one in lab.NODES if one != name)


def until(what, condition, patience=PATIENCE):
    start = time.time()
    while not condition():
        if time.time() - start > patience:
            raise AssertionError(f"not within {patience} s: {what}")
        time.sleep(0.1)
    return time.time() - start


class Beats(threading.Thread):
    """Looks at the files to which a guest prints, and knows where it ran and when."""

    def __init__(self, vm="vm1"):
        super().__init__(daemon=True)
        self.vm = vm
        self.lock = threading.Lock()
        self.sizes = {}
        # (time, node) of each time that another file grew than before.
        self.turns = []
        self.grew = {}
        # The nodes on which the file was emptied: a service does that when it boots a guest.
        self.emptied = []
        # Where it ran at the last `fresh`.
        self.first = set()

    def run(self):
        while True:
            for name in lab.NODES:
                try:
                    size = beat_file(name, self.vm).stat().st_size
                except OSError:
                    size = 0
                with self.lock:
                    if size < self.sizes.get(name, 0):
                        self.emptied.append(name)
                    if size != self.sizes.get(name, 0):
                        self.sizes[name] = size
                        # A file that is emptied or begun is a guest that is being made: it does not run yet.
                        if size:
                            self.grew[name] = time.time()
                            if not self.turns or self.turns[-1][1] != name:
                                self.turns.append((time.time(), name))
            time.sleep(0.01)

    def forget(self):
        with self.lock:
            self.turns = self.turns[-1:]

    def fresh(self):
        """Removes the file of a node where the guest is not, and forgets what was."""
        for name in lab.NODES:
            if name not in self.runs_at():
                beat_file(name, self.vm).unlink(missing_ok=True)
        time.sleep(0.1)
        self.forget()
        with self.lock:
            self.emptied = []
            self.first = {name for _, name in self.turns}

    def booted(self):
        """The nodes on which a guest started anew since `fresh`. One that arrives counts on."""
        with self.lock:
            nodes = set(self.emptied)
        return nodes | {name for name in lab.NODES if name not in self.first and counts(name, self.vm)[:1] in ([0], [1], [2])}

    def seen(self):
        with self.lock:
            return list(self.turns), dict(self.grew)

    def runs_at(self):
        """The nodes on which the guest printed within the last second."""
        _, grew = self.seen()
        return [name for name, when in grew.items() if time.time() - when < 1]


def beat_file(name, vm="vm1"):
    return lab.STATE / name / BEAT / vm


def counts(name, vm="vm1"):
    try:
        text = beat_file(name, vm).read_text(errors="replace")
    except FileNotFoundError:
        return []
    return [int(number) for number in re.findall(r"heartbeat count=(\d+) uptime_ms=\d+ writes=\d+\n", text)]


def actions(since, vm="vm1"):
    """What Pacemaker had done with a VM: (node, action, result), from its logs."""
    found = []
    for name in lab.NODES:
        for line in (lab.STATE / name / "log/pacemaker/pacemaker.log").read_text(errors="replace").splitlines():
            match = re.search(r"Result of (\S+) operation for (\S+) on (\S+): (\S+)", line)
            if match and (match[2], match[3]) == (vm, name):
                stamp = " ".join([str(time.localtime().tm_year), *line.split()[:3]])
                if datetime.datetime.strptime(stamp, "%Y %b %d %H:%M:%S.%f").timestamp() >= since:
                    found.append((name, match[1], match[4].rstrip(",;|")))
    return found


def phase(name, vm="vm1"):
    listed = node(name, "wh-remote", "--json", "migrations", check=False)
    try:
        mine = [one for one in json.loads(listed) if one.get("vm") == vm]
    except ValueError:
        return None
    return mine[-1]["phase"] if mine else None


def keep(name):
    """Copies what the nodes wrote to a folder of this name, and returns its path. The next lab begins with an empty one."""
    kept = lab.TARGET / "cluster-failed" / name
    shutil.rmtree(kept, ignore_errors=True)
    for one in lab.NODES:
        for part in ("log", "lib/pengine", "beat"):
            shutil.copytree(lab.STATE / one / part, kept / one / part, dirs_exist_ok=True)
        shutil.copy(lab.STATE / one / "console", kept / one)
    shutil.copy(lab.STATE / "power.log", kept)
    with open(kept / "status", "w", encoding="utf-8") as status:
        for one in lab.NODES:
            try:
                status.write(f"{one}:\n{node(one, 'crm_mon', '-1rf', check=False)}\n{node(one, 'wh-remote', 'migrations', check=False)}\n")
            except SystemExit as off:
                status.write(f"{off}\n")
    return kept


def running_on(name, beats):
    return until(f"the guest {beats.vm} runs on {name}", lambda: beats.runs_at() == [name])


def is_served():
    return f"Started: [ {' '.join(lab.NODES)} ]" in node("n1", "crm_mon", "-1")


def settle(at="n1"):
    """Waits until Pacemaker has nothing to do, as one node sees it. `crm_resource --wait` looks every 2 s only.

    After a reload, the scheduler may plan an action that the coordinator never takes: a coordinator that has been idle
    for 3 s has nothing to do, either.
    """
    idle_since = None

    def is_settled():
        nonlocal idle_since
        # The plan first: an action that begins in between is then in the plan, or the coordinator is busy with it.
        planned = node(at, "crm_simulate", "--live-check", "--run", "--output-as=xml", check=False)
        coordinator = re.search(r'<current_dc present="true".* name="([^"]+)"', node(at, "crm_mon", "-1", "--output-as=xml", check=False))
        if not coordinator or 'state="S_IDLE"' not in node(at, "crmadmin", "--status", coordinator[1], "--output-as=xml", check=False):
            idle_since = None
            return False
        idle_since = idle_since or time.time()
        has_plan = "<rsc_action " in planned or "<pacemaker-result" not in planned
        return not has_plan or time.time() - idle_since > 3
    until("Pacemaker has nothing to do", is_settled)


def ready(beats):
    """The guest runs on a node, counts, and can move to the other."""
    until("the guest runs", lambda: len(beats.runs_at()) == 1)
    until("the guest counts", lambda: len(counts(beats.runs_at()[0], beats.vm)) > 20)
    until("the service runs on both nodes", is_served)
    settle()


def power_offs(since):
    offs = {}
    for line in (lab.STATE / "power.log").read_text().splitlines():
        words = line.split()
        if words[1:2] == ["off"] and float(words[0]) >= since:
            offs.setdefault(words[2], float(words[0]))
    return offs


def is_fenced(survivor, off, since):
    history = node(survivor, "stonith_admin", "--history", off, "--verbose", "--output-as=xml", check=False)
    completed = re.findall(r'<fence_event [^>]*status="success"[^>]*completed="([^"]+)Z"', history)
    zone = datetime.timezone.utc
    return any(datetime.datetime.fromisoformat(one).replace(tzinfo=zone).timestamp() >= int(since) for one in completed)


def running_on_for_good(name, beats, since):
    running_on(name, beats)
    took = time.time() - since
    # Nothing follows: no second start, no stop.
    for _ in range(30):
        time.sleep(0.1)
        assert beats.runs_at() == [name], beats.runs_at()
    return took
