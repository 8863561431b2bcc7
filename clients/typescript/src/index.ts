/**
 * Client of a Whimbrel service.
 *
 * `schema.ts` is generated from the service's OpenAPI document: the types of all paths and bodies.
 * `openapi-fetch` sends requests that are checked against them. This module adds what the document
 * does not say: how to connect, a refusal as an error, and streams.
 */

import { setTimeout as sleep } from "node:timers/promises";

import createClient from "openapi-fetch";
import { Agent, fetch, Headers, Request } from "undici";

import type { components, paths } from "./schema.js";

export type { components, paths };

/** The types of all bodies, by name: `Schemas["VmConfig"]`. */
export type Schemas = components["schemas"];

/** Connects as `connect` says. `close` ends all its connections. */
export type Client = ReturnType<typeof createClient<paths>> & { close(): Promise<void> };

/** A request that the service refused, with its problem body (RFC 9457). */
export class Refused extends Error {
  override readonly name = "Refused";
  /** HTTP status. */
  readonly status: number;
  /** Stable name of the reason, for programs: `wrong-state`, `no-such-vm`, ... */
  readonly code: string;
  /** Explanation for people. */
  readonly detail: string;
  /** Problems of single fields of the request's body. */
  readonly errors: Schemas["FieldProblem"][];

  constructor(problem: Schemas["Problem"]) {
    const errors = problem.errors ?? [];
    const fields = errors.map((e) => `\n  ${e.pointer}: ${e.detail} (${e.code})`).join("");
    super(`${problem.detail} (${problem.code})${fields}`);
    this.status = problem.status;
    this.code = problem.code;
    this.detail = problem.detail;
    this.errors = errors;
  }
}

/** The service no longer keeps some events after the number that `followEvents` was given. */
export class EventsMissed extends Error {
  override readonly name = "EventsMissed";

  /** @param oldest Number of the oldest event that is kept. */
  constructor(readonly oldest: number) {
    super(`the oldest event that the service keeps is number ${oldest}`);
  }
}

/**
 * Returns a client of the service at `address`: `unix:/run/whimbrel.sock` or
 * `http://127.0.0.1:8080`. Over TCP the service asks for the `token` of its `--api-token-file`.
 *
 * The client connects at the first request.
 */
export function connect(address: string, options: { token?: string } = {}): Client {
  const socketPath = address.startsWith("unix:") ? address.slice("unix:".length) : undefined;
  // Not the global fetch: its version of undici need not understand this Agent.
  const dispatcher = new Agent(socketPath === undefined ? {} : { connect: { socketPath } });
  const client = createClient<paths>({
    // Over a unix socket the host only fills the header that HTTP/1.1 demands.
    baseUrl: socketPath === undefined ? address : "http://localhost",
    headers: options.token === undefined ? {} : { Authorization: `Bearer ${options.token}` },
    // undici declares types of its own for what is the same in the language's library.
    Request: Request as unknown as typeof globalThis.Request,
    fetch: (request) =>
      fetch(request as unknown as Request, { dispatcher }) as unknown as Promise<Response>,
  });
  return Object.assign(client, { close: () => dispatcher.destroy() });
}

interface Result<T> {
  data?: T;
  error?: Schemas["Problem"];
  response: Response;
}

/**
 * Returns the body of a successful response, `undefined` where it has none.
 *
 * @throws {Refused} for every other response.
 */
export async function answer<T>(request: Promise<Result<T>>): Promise<T> {
  const { data, error, response } = await request;
  if (!response.ok) {
    if (error === undefined) throw new Error(`HTTP status ${response.status} without a body`);
    throw new Refused(error);
  }
  return data as T;
}

const OVER: ReadonlySet<string> = new Set(["completed", "canceled", "failed"]);

/**
 * Yields the progress of a migration until it is over; the last one yielded is its outcome.
 *
 * A migration in doubt (`in-doubt`) is not over: an operator has to decide, so the iteration continues
 * until then.
 */
export async function* followMigration(
  client: Client,
  id: string,
  everyMs = 100,
): AsyncGenerator<Schemas["MigrationInfo"], void> {
  for (;;) {
    const info = await answer(
      client.GET("/api/v1/migrations/{id}", { params: { path: { id } } }),
    );
    yield info;
    if (OVER.has(info.phase)) return;
    await sleep(everyMs);
  }
}

/**
 * Yields events of the service as they happen, until the service ends.
 *
 * `after` resumes behind the event of that number; 0 begins with the oldest that is kept, and
 * without it with the next. `vm` selects the events of one VM.
 *
 * @throws {EventsMissed} if events behind `after` are no longer kept.
 */
export async function* followEvents(
  client: Client,
  query: { after?: number; vm?: string } = {},
): AsyncGenerator<Schemas["Event"], void> {
  const parameters = { params: { query }, parseAs: "stream" } as const;
  const stream = await answer(client.GET("/api/v1/events", parameters));
  if (stream === null) return;
  for await (const { event, data } of serverSentEvents(stream)) {
    if (event === "missed") throw new EventsMissed((data as { oldest: number }).oldest);
    yield data as Schemas["Event"];
  }
}

/** Splits a stream of server-sent events into their names and their data, which is JSON. */
async function* serverSentEvents(stream: ReadableStream<Uint8Array>) {
  let [text, event, data] = ["", "message", ""];
  const decoder = new TextDecoder();
  for await (const bytes of stream as unknown as AsyncIterable<Uint8Array>) {
    text += decoder.decode(bytes, { stream: true });
    const lines = text.split("\n");
    text = lines.pop() ?? "";
    for (const line of lines) {
      const [, name, value] = /^([^:]*)(?:: ?)?(.*)$/.exec(line) ?? [];
      if (line === "") {
        if (data !== "") yield { event, data: JSON.parse(data) as unknown };
        [event, data] = ["message", ""];
      } else if (name === "event") event = value ?? "";
      else if (name === "data") data += value ?? "";
    }
  }
}
