"""The generated client against two services that run the pocket guest.

WHIMBREL=target/debug/whimbrel POCKET=pocket.elf python -m unittest discover clients/python/tests
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import httpx

from whimbrel import EventsMissed, Refused, answer, connect, follow_events, follow_migration
from whimbrel.rest import Client
from whimbrel.rest.api.cloud_hypervisor import vm_delete, vm_info
from whimbrel.rest.api.migrations import list_migrations, migrate_vm, receive_migration
from whimbrel.rest.api.service import get_document, get_metrics, ping
from whimbrel.rest.api.vms import (
    add_disk,
    boot_vm,
    create_vm,
    delete_vm,
    ensure_vm,
    get_counters,
    get_memory_map,
    get_vm,
    list_vms,
    pause_vm,
    remove_device,
    resume_vm,
)
from whimbrel.rest.errors import UnexpectedStatus
from whimbrel.rest.models import (
    AwaitMigration,
    ConsoleConfig,
    ConsoleMode,
    CpusConfig,
    CreateVm,
    DeviceState,
    DeviceTree,
    DiskConfig,
    ImageType,
    MemoryConfig,
    MigrationDowntime,
    MigrationPhase,
    MigrationSide,
    PayloadConfig,
    PciDeviceInfo,
    SerialConfig,
    StartMigration,
    VmConfig,
    VmRemoveDevice,
    VmState,
)

T = TypeVar("T")

MIB = 1 << 20
# Bounds a wait for what must happen; never how long it may take.
PATIENCE_S = 60.0


def wait_for(what: str, look: Callable[[], T | None]) -> T:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        found = look()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {PATIENCE_S} s")


class Service:
    """A service in a directory of its own, on a unix socket and on a TCP port with a token."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="whimbrel-python.")
        self.directory = Path(self._directory.name)
        self.address = f"unix:{self.directory}/api.sock"
        self.token = secrets.token_hex(32)
        token_file = self.directory / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(self.token)
        program = [os.environ["WHIMBREL"], "serve", "--socket", str(self.directory / "api.sock")]
        tcp = ["--tcp", "127.0.0.1:0", "--api-token-file", str(token_file)]
        with open(self.directory / "log", "wb") as log:
            self._process = subprocess.Popen(
                [*program, *tcp], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.client = connect(self.address)
        wait_for("a service that answers", self._answers)

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError(f"whimbrel ended: {self.log()}")
        try:
            return answer(ping.sync_detailed(client=self.client)).version != ""
        except httpx.ConnectError:
            return False

    def tcp(self) -> str:
        """Returns the URL of the TCP port, which the service logs."""
        return wait_for("a TCP address", lambda: re.search(r"http://127.0.0.1:\d+", self.log()))[0]

    def log(self) -> str:
        return (self.directory / "log").read_text()

    def stop(self) -> None:
        self.client.get_httpx_client().close()
        self._process.terminate()
        self._process.wait(PATIENCE_S)
        log = self.log()
        self._directory.cleanup()
        # The service runs in its sandbox, which allows all that a client needs.
        if "the sandbox refused a system call" in log:
            raise AssertionError(log)

    def disk(self, name: str) -> str:
        path = self.directory / name
        with open(path, "wb") as image:
            image.truncate(4 * MIB)
        return str(path)

    def pocket(self, name: str, cmdline: str = "workload=idle heartbeat_ms=20") -> VmConfig:
        return VmConfig(
            payload=PayloadConfig(kernel=os.environ["POCKET"], cmdline=cmdline),
            cpus=CpusConfig(boot_vcpus=1, max_vcpus=1),
            memory=MemoryConfig(size=64 * MIB),
            serial=SerialConfig(mode=ConsoleMode.FILE, file=str(self.directory / name)),
            console=ConsoleConfig(mode=ConsoleMode.OFF),
        )

    def boot(self, name: str, config: VmConfig | None = None) -> None:
        config = config or self.pocket(name)
        answer(create_vm.sync_detailed(client=self.client, body=CreateVm(id=name, config=config)))
        answer(boot_vm.sync_detailed(name, client=self.client))
        self.prints(name, "pocket: ready")

    def prints(self, name: str, text: str) -> None:
        """Waits until the guest prints `text` after all that it has printed so far."""
        path = self.directory / name
        old = path.read_text() if path.exists() and text == "pocket: heartbeat" else ""
        wait_for(text, lambda: path.exists() and text in path.read_text()[len(old) :])


class ServiceTest(unittest.TestCase):
    source: Service
    destination: Service

    @classmethod
    def setUpClass(cls) -> None:
        cls.source = Service()
        cls.addClassCleanup(cls.source.stop)
        cls.destination = Service()
        cls.addClassCleanup(cls.destination.stop)

    @property
    def client(self) -> Client:
        return self.source.client

    def refusal(self, request: Callable[[], object]) -> Refused:
        with self.assertRaises(Refused) as caught:
            request()
        return caught.exception

    def test_vm_lives_and_ends(self) -> None:
        config = self.source.pocket("life")
        summary = answer(ensure_vm.sync_detailed("life", client=self.client, body=config))
        self.assertEqual((summary.state, summary.memory), (VmState.CREATED, 64 * MIB))
        again = ensure_vm.sync_detailed("life", client=self.client, body=config)
        self.assertEqual((again.status_code, answer(again)), (200, summary))

        self.assertIsNone(answer(boot_vm.sync_detailed("life", client=self.client)))
        self.source.prints("life", "pocket: heartbeat")
        info = answer(get_vm.sync_detailed("life", client=self.client))
        self.assertEqual((info.state, info.config.payload), (VmState.RUNNING, config.payload))
        names = [vm.id for vm in answer(list_vms.sync_detailed(client=self.client))]
        self.assertIn("life", names)
        spaces = answer(get_memory_map.sync_detailed("life", client=self.client)).spaces
        self.assertIn("memory", [space.name for space in spaces])
        answer(get_counters.sync_detailed("life", client=self.client))
        metrics = answer(get_metrics.sync_detailed(client=self.client))
        self.assertIn("whimbrel_vms", metrics)

        answer(pause_vm.sync_detailed("life", client=self.client))
        info = answer(get_vm.sync_detailed("life", client=self.client))
        self.assertEqual(info.state, VmState.PAUSED)
        answer(resume_vm.sync_detailed("life", client=self.client))
        self.source.prints("life", "pocket: heartbeat")
        answer(delete_vm.sync_detailed("life", client=self.client))
        gone = self.refusal(lambda: answer(get_vm.sync_detailed("life", client=self.client)))
        self.assertEqual((gone.status, gone.code), (404, "no-such-vm"))

    def test_refusals_have_a_code_and_name_the_field(self) -> None:
        config = self.source.pocket("refused")
        config.memory = MemoryConfig(size=4097)
        body = CreateVm(id="refused", config=config)
        refused = self.refusal(
            lambda: answer(create_vm.sync_detailed(client=self.client, body=body))
        )
        self.assertEqual((refused.status, refused.code), (422, "invalid-configuration"))
        self.assertTrue(any(error.pointer.endswith("/memory/size") for error in refused.errors))
        self.assertIn("4097", str(refused))

        config.memory = MemoryConfig(size=64 * MIB)
        answer(create_vm.sync_detailed(client=self.client, body=body))
        self.addCleanup(lambda: answer(delete_vm.sync_detailed("refused", client=self.client)))
        refused = self.refusal(
            lambda: answer(pause_vm.sync_detailed("refused", client=self.client))
        )
        self.assertEqual((refused.status, refused.code), (409, "wrong-state"))
        refused = self.refusal(
            lambda: answer(create_vm.sync_detailed(client=self.client, body=body))
        )
        self.assertEqual((refused.status, refused.code), (409, "vm-exists"))
        # A status that the operation does not declare.
        refused = self.refusal(lambda: answer(get_vm.sync_detailed("a b", client=self.client)))
        self.assertEqual(refused.status // 100, 4)

    def test_disk_is_added_to_a_running_guest(self) -> None:
        self.source.boot("disks")
        self.addCleanup(lambda: answer(delete_vm.sync_detailed("disks", client=self.client)))
        path = self.source.disk("data.raw")
        disk = DiskConfig(id="data", path=path, image_type=ImageType.RAW)
        added = answer(add_disk.sync_detailed("disks", client=self.client, body=disk))
        self.assertIsInstance(added, PciDeviceInfo)
        self.assertRegex(added.bdf, r"^0000:00:[0-9a-f]{2}\.0$")
        self.assertEqual(self.devices()["data"].pci_bdf, added.bdf)

        again = self.refusal(
            lambda: answer(add_disk.sync_detailed("disks", client=self.client, body=disk))
        )
        self.assertEqual((again.status, again.code), (409, "device-exists"))
        # The pocket guest has no driver for hotplug, so it never ejects the disk.
        remove = VmRemoveDevice(id="data")
        answer(remove_device.sync_detailed("disks", client=self.client, body=remove))
        self.assertEqual(self.devices()["data"].state, DeviceState.LEAVING)

    def devices(self) -> DeviceTree:
        tree = answer(get_vm.sync_detailed("disks", client=self.client)).device_tree
        assert isinstance(tree, DeviceTree)
        return tree

    def test_vm_migrates_and_shows_its_progress(self) -> None:
        source, destination = self.source, self.destination
        # The console's file moves with the VM: both services are on this host.
        dirty = "workload=dirty region_mib=32 rate=4000 heartbeat_ms=20"
        source.boot("moves", source.pocket("moves", dirty))
        endpoint = f"unix:{destination.directory}/migration"
        awaited = answer(
            receive_migration.sync_detailed(
                client=destination.client, body=AwaitMigration(listen=endpoint)
            )
        )
        self.assertEqual(awaited.side, MigrationSide.DESTINATION)
        started = answer(
            migrate_vm.sync_detailed(
                "moves",
                client=source.client,
                # So slow that rounds are seen.
                body=StartMigration(destination=endpoint, max_bandwidth=64 * MIB),
            )
        )
        seen = list(follow_migration(source.client, started.id, every_s=0.01))
        last = seen[-1]
        self.assertEqual(last.phase, MigrationPhase.COMPLETED, last.error)
        self.assertIn(MigrationPhase.PRECOPY, [info.phase for info in seen])
        sent = [info.sent_bytes for info in seen]
        self.assertEqual(sent, sorted(sent))
        self.assertGreater(len(set(sent)), 2, "progress was seen")
        assert isinstance(last.downtime, MigrationDowntime)
        self.assertGreater(last.downtime.total_us, 0)

        (*_, arrived) = follow_migration(destination.client, awaited.id)
        self.assertEqual((arrived.phase, arrived.vm), (MigrationPhase.COMPLETED, "moves"))
        there = answer(get_vm.sync_detailed("moves", client=destination.client))
        self.assertEqual(there.state, VmState.RUNNING)
        source.prints("moves", "pocket: heartbeat")
        gone = self.refusal(lambda: answer(get_vm.sync_detailed("moves", client=source.client)))
        self.assertEqual(gone.code, "no-such-vm")
        known = answer(list_migrations.sync_detailed(client=source.client))
        self.assertIn(started.id, [info.id for info in known])
        answer(delete_vm.sync_detailed("moves", client=destination.client))

    def test_migration_to_nowhere_fails_with_a_code(self) -> None:
        self.source.boot("stays")
        self.addCleanup(lambda: answer(delete_vm.sync_detailed("stays", client=self.client)))
        body = StartMigration(destination=f"unix:{self.source.directory}/missing")
        started = answer(migrate_vm.sync_detailed("stays", client=self.client, body=body))
        (*_, last) = follow_migration(self.client, started.id)
        self.assertEqual(last.phase, MigrationPhase.FAILED)
        assert last.error
        self.assertNotEqual(last.error.code, "")
        info = answer(get_vm.sync_detailed("stays", client=self.client))
        self.assertEqual(info.state, VmState.RUNNING)

    def test_events_are_followed(self) -> None:
        self.source.boot("events")
        answer(delete_vm.sync_detailed("events", client=self.client))
        seen = []
        for event in follow_events(self.client, after=0, vm="events"):
            seen.append(event)
            if event.event == "deleted":
                break
        self.assertEqual([event.event for event in seen[:2]], ["created", "booted"])
        numbers = [event.sequence for event in seen]
        self.assertEqual(numbers, sorted(set(numbers)))
        resumed = next(follow_events(self.client, after=numbers[0], vm="events"))
        self.assertEqual(resumed, seen[1])

    def test_lost_events_are_an_error(self) -> None:
        config = self.source.pocket("lost")
        answer(ensure_vm.sync_detailed("lost", client=self.client, body=config))
        answer(boot_vm.sync_detailed("lost", client=self.client))
        self.addCleanup(lambda: answer(delete_vm.sync_detailed("lost", client=self.client)))
        # More events of one VM than the service keeps.
        for _ in range(70):
            answer(pause_vm.sync_detailed("lost", client=self.client))
            answer(resume_vm.sync_detailed("lost", client=self.client))
        with self.assertRaises(EventsMissed) as caught:
            next(follow_events(self.client, after=1, vm="lost"))
        self.assertGreater(caught.exception.oldest, 1)

    def test_tcp_wants_the_token(self) -> None:
        with connect(self.source.tcp(), token=self.source.token) as client:
            answered = answer(ping.sync_detailed(client=client))
        self.assertEqual(answered, answer(ping.sync_detailed(client=self.client)))
        for token, code in ((None, "token-missing"), ("x" * 32, "token-wrong")):
            with connect(self.source.tcp(), token=token) as stranger:
                listed = list_vms.sync_detailed(client=stranger)
            refused = self.refusal(lambda listed=listed: answer(listed))  # type: ignore[misc]
            self.assertEqual((refused.status, refused.code), (401, code))

    def test_functions_for_asyncio(self) -> None:
        async def states() -> list[VmState]:
            async with connect(self.source.address) as client:
                body = CreateVm(id="async", config=self.source.pocket("async"))
                answer(await create_vm.asyncio_detailed(client=client, body=body))
                answer(await boot_vm.asyncio_detailed("async", client=client))
                asked = (get_vm.asyncio_detailed("async", client=client) for _ in range(4))
                infos = [answer(response) for response in await asyncio.gather(*asked)]
                answer(await delete_vm.asyncio_detailed("async", client=client))
            return [info.state for info in infos]

        self.assertEqual(asyncio.run(states()), [VmState.RUNNING] * 4)

    def test_vm_has_a_socket_with_cloud_hypervisors_api(self) -> None:
        self.source.boot("one")
        self.addCleanup(lambda: answer(delete_vm.sync_detailed("one", client=self.client)))
        (vm,) = [vm for vm in answer(list_vms.sync_detailed(client=self.client)) if vm.id == "one"]
        with connect(f"unix:{vm.api_socket}") as client:
            info = answer(vm_info.sync_detailed(client=client))
        self.assertEqual(info.state, VmState.RUNNING)

    def test_undeclared_status_is_no_success(self) -> None:
        # The service's own face has no such path, and the operation declares only 204 and 500.
        with self.assertRaises(UnexpectedStatus) as caught:
            answer(vm_delete.sync_detailed(client=self.client))
        self.assertEqual(caught.exception.status_code, 404)

    def test_example_of_the_readme_moves_a_vm(self) -> None:
        example = Path(__file__).parent.parent / "examples" / "migrate.py"
        services = (self.source.address, self.destination.address)
        words = [sys.executable, "-W", "error", str(example), *services, os.environ["POCKET"]]
        ran = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
        self.assertEqual((ran.returncode, ran.stderr), (0, ""))
        self.assertRegex(ran.stdout, r"\Awrong-state: .*\n")
        self.assertRegex(ran.stdout, r"\ncompleted: \d+ MiB sent, 0 pages left\nRunning\n\Z")

    def test_service_has_the_document_that_the_client_was_made_from(self) -> None:
        served = answer(get_document.sync_detailed(client=self.client))
        self.assertIn("bootVm", str(served["paths"]["/api/v1/vms/{id}/boot"]))


if __name__ == "__main__":
    unittest.main()
