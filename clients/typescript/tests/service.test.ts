// The generated types and openapi-fetch against two services that run the pocket guest.
//
//     WHIMBREL=target/debug/whimbrel POCKET=pocket.elf npm test

import assert from "node:assert/strict";
import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { once } from "node:events";
import { closeSync, existsSync, mkdtempSync, openSync, readFileSync, rmSync } from "node:fs";
import { truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import { answer, type Client, connect, EventsMissed, followEvents } from "whimbrel";
import { followMigration, Refused, type Schemas } from "whimbrel";

const MIB = 1024 * 1024;
// Bounds a wait for what must happen; never how long it may take.
const PATIENCE_MS = 60_000;

async function waitFor<T>(what: string, look: () => T | Promise<T>): Promise<NonNullable<T>> {
  const end = Date.now() + PATIENCE_MS;
  while (Date.now() < end) {
    const found = await look();
    if (found) return found;
    await sleep(20);
  }
  throw new Error(`${what}: not within ${PATIENCE_MS} ms`);
}

function environment(name: string): string {
  const value = process.env[name];
  assert(value, `${name} is not set`);
  return value;
}

/** A service in a directory of its own, on a unix socket and on a TCP port with a token. */
class Service {
  readonly token = randomBytes(32).toString("hex");
  readonly directory = mkdtempSync(join(tmpdir(), "whimbrel-typescript."));
  readonly client = connect(`unix:${this.path("api.sock")}`);
  readonly #process: ChildProcess;

  constructor() {
    writeFileSync(this.path("token"), this.token, { mode: 0o600 });
    const log = openSync(this.path("log"), "w");
    const tcp = ["--tcp", "127.0.0.1:0", "--api-token-file", this.path("token")];
    const words = ["serve", "--socket", this.path("api.sock"), ...tcp];
    this.#process = spawn(environment("WHIMBREL"), words, { stdio: ["ignore", log, log] });
    closeSync(log);
  }

  path(name: string): string {
    return join(this.directory, name);
  }

  log(): string {
    return readFileSync(this.path("log"), "utf8");
  }

  async answers(): Promise<void> {
    await waitFor("a service that answers", async () => {
      assert.equal(this.#process.exitCode, null, this.log());
      return existsSync(this.path("api.sock")) && (await this.client.GET("/api/v1/vmm.ping")).data;
    });
  }

  /** Returns the URL of the TCP port, which the service logs. */
  async tcp(): Promise<string> {
    return (await waitFor("a TCP address", () => /http:\/\/127\.0\.0\.1:\d+/.exec(this.log())))[0];
  }

  async stop(): Promise<void> {
    await this.client.close();
    this.#process.kill("SIGTERM");
    if (this.#process.exitCode === null) await once(this.#process, "exit");
    const log = this.log();
    rmSync(this.directory, { recursive: true });
    // The service runs in its sandbox, and nothing that a client does needs more than that allows.
    assert.doesNotMatch(log, /the sandbox refused a system call/);
  }

  pocket(name: string, cmdline = "workload=idle heartbeat_ms=20"): Schemas["VmConfig"] {
    return {
      payload: { kernel: environment("POCKET"), cmdline },
      cpus: { boot_vcpus: 1, max_vcpus: 1 },
      memory: { size: 64 * MIB },
      serial: { mode: "File", file: this.path(name) },
      console: { mode: "Off" },
    };
  }

  async boot(id: string, config = this.pocket(id)): Promise<void> {
    await answer(this.client.POST("/api/v1/vms", { body: { id, config } }));
    await answer(this.client.PUT("/api/v1/vms/{id}/boot", on(id)));
    await this.prints(id, "pocket: ready");
  }

  /** Waits until the guest prints `text`; a heartbeat after all that it has printed so far. */
  async prints(name: string, text: string): Promise<void> {
    const printed = () => (existsSync(this.path(name)) ? readFileSync(this.path(name), "utf8") : "");
    const old = text === "pocket: heartbeat" ? printed().length : 0;
    await waitFor(text, () => printed().slice(old).includes(text));
  }
}

/** The path parameter of a VM or migration. */
function on(id: string) {
  return { params: { path: { id } } };
}

async function refusal(request: Promise<unknown>): Promise<Refused> {
  const error = await request.then(() => undefined, (error: unknown) => error);
  assert(error instanceof Refused, `not refused: ${String(error)}`);
  return error;
}

let source: Service, destination: Service;
let client: Client;

before(async () => {
  source = new Service();
  destination = new Service();
  client = source.client;
  await source.answers();
  await destination.answers();
});

after(async () => {
  await source.stop();
  await destination.stop();
});

test("VM lives and ends", async () => {
  const config = source.pocket("life");
  const ensure = () => client.PUT("/api/v1/vms/{id}", { ...on("life"), body: config });
  const summary = await answer(ensure());
  assert.equal(summary.state, "Created");
  assert.equal(summary.memory, 64 * MIB);
  const again = await ensure();
  assert.equal(again.response.status, 200);
  assert.deepEqual(again.data, summary);

  assert.equal(await answer(client.PUT("/api/v1/vms/{id}/boot", on("life"))), undefined);
  await source.prints("life", "pocket: heartbeat");
  const info = await answer(client.GET("/api/v1/vms/{id}", on("life")));
  assert.equal(info.state, "Running");
  assert.deepEqual(info.config.payload, config.payload);
  const names = (await answer(client.GET("/api/v1/vms"))).map((vm) => vm.id);
  assert(names.includes("life"));
  const map = await answer(client.GET("/api/v1/vms/{id}/memory-map", on("life")));
  assert(map.spaces.some((space) => space.name === "memory"));
  const metrics = await answer(client.GET("/api/v1/metrics", { parseAs: "text" }));
  assert.match(metrics, /whimbrel_vms/);

  await answer(client.PUT("/api/v1/vms/{id}/pause", on("life")));
  assert.equal((await answer(client.GET("/api/v1/vms/{id}", on("life")))).state, "Paused");
  await answer(client.PUT("/api/v1/vms/{id}/resume", on("life")));
  await source.prints("life", "pocket: heartbeat");
  await answer(client.DELETE("/api/v1/vms/{id}", on("life")));
  const gone = await refusal(answer(client.GET("/api/v1/vms/{id}", on("life"))));
  assert.deepEqual([gone.status, gone.code], [404, "no-such-vm"]);
});

test("refusals have a code and name the field", async () => {
  const create = (size: number) => {
    const config = { ...source.pocket("refused"), memory: { size } };
    return answer(client.POST("/api/v1/vms", { body: { id: "refused", config } }));
  };
  const invalid = await refusal(create(4097));
  assert.deepEqual([invalid.status, invalid.code], [422, "invalid-configuration"]);
  assert(invalid.errors.some((error) => error.pointer.endsWith("/memory/size")));
  assert.match(invalid.message, /4097/);

  await create(64 * MIB);
  const paused = await refusal(answer(client.PUT("/api/v1/vms/{id}/pause", on("refused"))));
  assert.deepEqual([paused.status, paused.code], [409, "wrong-state"]);
  const exists = await refusal(create(64 * MIB));
  assert.deepEqual([exists.status, exists.code], [409, "vm-exists"]);
  // A status that the operation does not declare.
  const unnamed = await refusal(answer(client.GET("/api/v1/vms/{id}", on("a b"))));
  assert(unnamed.status >= 400 && unnamed.status < 500);
  await answer(client.DELETE("/api/v1/vms/{id}", on("refused")));
});

test("disk is added to a running guest", async () => {
  await source.boot("disks");
  const path = source.path("data.raw");
  writeFileSync(path, "");
  truncateSync(path, 4 * MIB);
  const disk: Schemas["DiskConfig"] = { id: "data", path, image_type: "Raw" };
  const add = () => client.PUT("/api/v1/vms/{id}/add-disk", { ...on("disks"), body: disk });
  const added = await answer(add());
  assert(added, "the guest runs, so the disk has an address");
  assert.match(added.bdf, /^0000:00:[0-9a-f]{2}\.0$/);
  const devices = async () => {
    const info = await answer(client.GET("/api/v1/vms/{id}", on("disks")));
    return info.device_tree ?? {};
  };
  assert.equal((await devices())["data"]?.pci_bdf, added.bdf);
  const again = await refusal(answer(add()));
  assert.deepEqual([again.status, again.code], [409, "device-exists"]);
  // The pocket guest has no driver for hotplug, so it never ejects the disk.
  const remove = { ...on("disks"), body: { id: "data" } };
  await answer(client.PUT("/api/v1/vms/{id}/remove-device", remove));
  assert.equal((await devices())["data"]?.state, "Leaving");
  await answer(client.DELETE("/api/v1/vms/{id}", on("disks")));
});

test("VM migrates and shows its progress", async () => {
  // The console's file moves with the VM: both services are on this host.
  const dirty = "workload=dirty region_mib=32 rate=4000 heartbeat_ms=20";
  await source.boot("moves", source.pocket("moves", dirty));
  const endpoint = `unix:${destination.path("migration")}`;
  const body = { listen: endpoint };
  const awaited = await answer(destination.client.POST("/api/v1/migrations", { body }));
  assert.equal(awaited.side, "destination");
  const started = await answer(
    client.POST("/api/v1/vms/{id}/migrations", {
      ...on("moves"),
      // So slow that rounds are seen.
      body: { destination: endpoint, max_bandwidth: 64 * MIB },
    }),
  );
  const seen: Schemas["MigrationInfo"][] = [];
  for await (const info of followMigration(client, started.id, 10)) seen.push(info);
  const last = seen.at(-1);
  assert.equal(last?.phase, "completed", JSON.stringify(last?.error));
  assert(seen.some((info) => info.phase === "precopy"));
  const sent = seen.map((info) => info.sent_bytes);
  assert.deepEqual(sent, [...sent].sort((a, b) => a - b));
  assert(new Set(sent).size > 2, "progress was seen");
  assert((last.downtime?.total_us ?? 0) > 0);

  for await (const info of followMigration(destination.client, awaited.id)) seen.push(info);
  assert.deepEqual([seen.at(-1)?.phase, seen.at(-1)?.vm], ["completed", "moves"]);
  const there = await answer(destination.client.GET("/api/v1/vms/{id}", on("moves")));
  assert.equal(there.state, "Running");
  await source.prints("moves", "pocket: heartbeat");
  const gone = await refusal(answer(client.GET("/api/v1/vms/{id}", on("moves"))));
  assert.equal(gone.code, "no-such-vm");
  await answer(destination.client.DELETE("/api/v1/vms/{id}", on("moves")));
});

test("events are followed", async () => {
  await source.boot("events");
  await answer(client.DELETE("/api/v1/vms/{id}", on("events")));
  const seen: string[] = [];
  for await (const { event } of followEvents(client, { after: 0, vm: "events" })) {
    seen.push(event);
    if (event === "deleted") break;
  }
  assert.deepEqual(seen.slice(0, 2), ["created", "booted"]);
});

test("lost events are an error", async () => {
  await source.boot("lost");
  // More events of one VM than the service keeps.
  for (let i = 0; i < 70; i++) {
    await answer(client.PUT("/api/v1/vms/{id}/pause", on("lost")));
    await answer(client.PUT("/api/v1/vms/{id}/resume", on("lost")));
  }
  const events = followEvents(client, { after: 1, vm: "lost" });
  await assert.rejects(events.next(), (error) => error instanceof EventsMissed && error.oldest > 1);
  await answer(client.DELETE("/api/v1/vms/{id}", on("lost")));
});

test("TCP wants the token", async () => {
  const address = await source.tcp();
  const friend = connect(address, { token: source.token });
  const ping = await answer(friend.GET("/api/v1/vmm.ping"));
  assert.deepEqual(ping, await answer(client.GET("/api/v1/vmm.ping")));
  await friend.close();
  for (const [token, code] of [[{}, "token-missing"], [{ token: "x".repeat(32) }, "token-wrong"]] as const) {
    const stranger = connect(address, token);
    const refused = await refusal(answer(stranger.GET("/api/v1/vms")));
    assert.deepEqual([refused.status, refused.code], [401, code]);
    await stranger.close();
  }
});

test("VM has a socket with Cloud Hypervisor's API", async () => {
  await source.boot("one");
  const vms = await answer(client.GET("/api/v1/vms"));
  const socket = vms.find((vm) => vm.id === "one")?.api_socket;
  assert(socket);
  const vm = connect(`unix:${socket}`);
  const { data } = await vm.GET("/api/v1/vm.info");
  assert.equal(data?.state, "Running");
  await vm.close();
  await answer(client.DELETE("/api/v1/vms/{id}", on("one")));
});

test("example of the README moves a VM", () => {
  const example = new URL("../examples/migrate.js", import.meta.url).pathname;
  const services = [source, destination].map((service) => `unix:${service.path("api.sock")}`);
  const words = [example, ...services, environment("POCKET")];
  const printed = execFileSync(process.execPath, words, { encoding: "utf8", timeout: PATIENCE_MS });
  assert.match(printed, /^wrong-state: .*\n/);
  assert.match(printed, /^completed: \d+ MiB, 0 pages left\nRunning\n$/m);
});
