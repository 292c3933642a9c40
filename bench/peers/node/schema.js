// The executable schema that both servers serve: resolvers over MongoDB, relations through DataLoader.

import { readFileSync } from "node:fs";

import { makeExecutableSchema } from "@graphql-tools/schema";
import DataLoader from "dataloader";
import { GraphQLScalarType, Kind } from "graphql";
import { MongoClient, ObjectId } from "mongodb";

const MAX_TIME_MS = 5000;
const BATCH = 10_000;
const CONNECTIONS = 32; // with 100, commands outlast their time in MongoDB when 200 clients ask
const VISIBLE = { principals: "public", state: "ACTIVE" };

const ORDERS = {
  TRENDING: "stats.trending_score",
  RELEVANCE: "score",
  DOWNLOADS_30D: "stats.downloads_30d",
};

// Which stored names a field needs, where it is not its own name.
const NAMES = {
  fullName: ["owner_login", "name"],
  owner: ["owner_id"],
  latestVersion: ["latest_version_id"],
  createdAt: ["created_at"],
  updatedAt: ["updated_at"],
  stats: ["stats.downloads_30d", "stats.likes"],
  id: [],
  edges: [],
  node: [],
  nodes: [],
  pageInfo: [],
  totalCount: [],
  score: ["score"],
};

export async function connect() {
  const client = new MongoClient(process.env.MODELHARBOR_MONGO_URL, {
    maxPoolSize: CONNECTIONS,
    readConcern: { level: "majority" },
  });
  await client.connect();
  return client.db(process.env.MODELHARBOR_MONGO_DATABASE);
}

// Made anew for each request.
export function makeContext(database) {
  const owners = new DataLoader(async (ids) =>
    inOrder(
      ids,
      await byIds(database, "actors", ids, {}, { kind: 1, login: 1, display_name: 1 }),
    ),
  );
  const versions = new DataLoader(async (ids) =>
    inOrder(
      ids,
      await byIds(
        database,
        "versions",
        ids,
        { status: { $ne: "DELETED" } },
        { number: 1, size_bytes: 1, file_count: 1, published_at: 1 },
      ),
    ),
  );
  const files = new Map(); // a loader for each length of a page
  return {
    database,
    owners,
    versions,
    files(first) {
      let found = files.get(first);
      if (found === undefined) {
        found = new DataLoader((ids) => firstFiles(database, ids, first));
        files.set(first, found);
      }
      return found;
    },
  };
}

// DataLoader tells keys apart by identity, so they are texts here.
function byIds(database, collection, ids, more, projection) {
  return database
    .collection(collection)
    .find(
      { _id: { $in: ids.map((id) => new ObjectId(id)) }, ...more },
      { projection, batchSize: BATCH, maxTimeMS: MAX_TIME_MS },
    )
    .toArray();
}

function inOrder(ids, rows) {
  const found = new Map(rows.map((row) => [row._id.toHexString(), row]));
  return ids.map((id) => found.get(id) ?? null);
}

async function firstFiles(database, ids, first) {
  const rows = await database
    .aggregate(
      [
        { $documents: ids.map((id) => ({ key: new ObjectId(id) })) },
        {
          $lookup: {
            from: "files",
            localField: "key",
            foreignField: "version_id",
            pipeline: [
              { $sort: { path: 1 } },
              { $limit: first + 1 },
              { $project: { _id: 0, path: 1, size_bytes: 1, sha256: 1, format: 1 } },
            ],
            as: "rows",
          },
        },
      ],
      { maxTimeMS: MAX_TIME_MS, batchSize: BATCH },
    )
    .toArray();
  const found = new Map(rows.map((row) => [row.key.toHexString(), row.rows]));
  return ids.map((id) => ({ nodes: found.get(id).slice(0, first) }));
}

// Documents are parsed once, so what a selection needs is told once as well.
const projections = new WeakMap();

function projectionOf(info, always) {
  const [node] = info.fieldNodes;
  let found = projections.get(node);
  if (found === undefined) {
    found = {};
    for (const name of always) {
      found[name] = 1;
    }
    collect(node.selectionSet, found, info.fragments);
    projections.set(node, found);
  }
  return found;
}

function collect(selectionSet, found, fragments) {
  for (const node of selectionSet.selections) {
    if (node.kind === Kind.FRAGMENT_SPREAD) {
      collect(fragments[node.name.value].selectionSet, found, fragments);
    } else if (node.kind === Kind.INLINE_FRAGMENT) {
      collect(node.selectionSet, found, fragments);
    } else {
      const name = node.name.value;
      for (const stored of NAMES[name] ?? [name]) {
        found[stored] = 1;
      }
      if (name === "edges" || name === "nodes" || name === "node") {
        collect(node.selectionSet, found, fragments);
      }
    }
  }
}

function condition(given) {
  return given.eq != null ? given.eq : { $in: given.in };
}

function filterOf(given) {
  const query = { ...VISIBLE };
  for (const [name, value] of Object.entries(given ?? {})) {
    query[name] = condition(value);
  }
  return query;
}

function valueAt(row, path) {
  return path.split(".").reduce((value, name) => value[name], row);
}

function encodeCursor(tag, path, row) {
  return Buffer.from(
    JSON.stringify([tag, valueAt(row, path), row._id.toHexString()]),
  ).toString("base64url");
}

async function models(_, { first, after, search, filter, orderBy }, { database }, info) {
  const limit = first ?? 20;
  const path = ORDERS[orderBy?.field ?? (search == null ? "TRENDING" : "RELEVANCE")];
  const ascending = orderBy?.direction === "ASC";
  const tag = (ascending ? "+" : "-") + path;
  const direction = ascending ? 1 : -1;
  const sort = { [path]: direction, _id: direction };
  const base = filterOf(filter);
  const projection = projectionOf(info, [path]);
  const collection = database.collection("models");
  let query = base;
  if (search != null) {
    const words = search.match(/[\p{L}\p{N}_]+/gu).map((word) => `"${word}"`);
    query = { $text: { $search: words.join(" ") }, ...base };
    const rows = await collection
      .aggregate(
        [
          { $match: query },
          { $set: { score: { $meta: "textScore" } } },
          { $sort: sort },
          { $limit: limit + 1 },
          { $project: projection },
        ],
        { maxTimeMS: MAX_TIME_MS, batchSize: limit + 2 },
      )
      .toArray();
    return { rows, limit, tag, path, query };
  }
  let window = base;
  if (after != null) {
    const [, value, id] = JSON.parse(Buffer.from(after, "base64url").toString());
    const operator = ascending ? "$gt" : "$lt";
    window = {
      $or: [
        { ...base, [path]: { [operator]: value } },
        { ...base, [path]: value, _id: { [operator]: new ObjectId(id) } },
      ],
    };
  }
  const rows = collection
    .find(window, {
      projection,
      sort,
      limit: limit + 1,
      batchSize: limit + 2,
      maxTimeMS: MAX_TIME_MS,
    })
    .toArray();
  // The count, where it is asked for, does not wait for the rows.
  const counting = countsTotal(info)
    ? collection.countDocuments(query, { maxTimeMS: MAX_TIME_MS })
    : null;
  const [found, total] = await Promise.all([rows, counting]);
  return { rows: found, limit, tag, path, query, total };
}

// Writes as ours, without what ours does beside them: who may, idempotency, the log of changes.
function changeModel(database, id, change) {
  const [typename, key] = Buffer.from(id, "base64").toString().split(":");
  if (typename !== "Model") {
    return null;
  }
  return database
    .collection("models")
    .findOneAndUpdate({ _id: new ObjectId(key), state: "ACTIVE" }, change, {
      returnDocument: "after",
      writeConcern: { w: "majority" },
      maxTimeMS: MAX_TIME_MS,
    });
}

async function updateModel(_, { input }, { database }) {
  const { id, summary, addTags, removeTags } = input;
  const change = { $set: { updated_at: new Date() }, $inc: { revision: 1 } };
  if (summary !== undefined) {
    change.$set.summary = summary;
  }
  if (addTags) {
    change.$addToSet = { tags: { $each: addTags } };
  } else if (removeTags) {
    change.$pull = { tags: { $in: removeTags } };
  }
  return payload(await changeModel(database, id, change));
}

// As `trending_score_expression` in src/db/models.py.
const TRENDING_SCORE = {
  $add: [
    {
      $log10: {
        $max: [1, { $add: ["$stats.downloads_30d", { $multiply: [10, "$stats.likes"] }] }],
      },
    },
    {
      $divide: [
        { $subtract: ["$created_at", new Date("2020-01-01T00:00:00Z")] },
        45 * 24 * 3600 * 1000,
      ],
    },
  ],
};

function liking(by) {
  return async (_, { input }, { database }) =>
    payload(
      await changeModel(database, input.id, [
        { $set: { "stats.likes": { $add: ["$stats.likes", by] }, "stats.as_of": "$$NOW" } },
        { $set: { "stats.trending_score": TRENDING_SCORE } },
      ]),
    );
}

function payload(model) {
  return model
    ? { model, userErrors: [] }
    : { model: null, userErrors: [{ code: "NOT_FOUND", message: "There is no such model." }] };
}

const counted = new WeakMap();

function countsTotal(info) {
  const [node] = info.fieldNodes;
  let found = counted.get(node);
  if (found === undefined) {
    found = node.selectionSet.selections.some(
      (selection) => selection.kind === Kind.FIELD && selection.name.value === "totalCount",
    );
    counted.set(node, found);
  }
  return found;
}

function nodesOf(page) {
  return page.rows.length > page.limit ? page.rows.slice(0, page.limit) : page.rows;
}

function globalId(typename, id) {
  return Buffer.from(`${typename}:${id.toHexString()}`).toString("base64");
}

function scalar(name, serialize) {
  return new GraphQLScalarType({ name, serialize, parseValue: (value) => value });
}

const actor = {
  id: (row) => globalId(row.kind, row._id),
  displayName: (row) => row.display_name,
};

const resolvers = {
  BigInt: scalar("BigInt", String),
  Cursor: scalar("Cursor", String),
  DateTime: scalar("DateTime", (value) => value.toISOString()),
  SHA256: scalar("SHA256", String),
  Query: {
    model: (_, { owner, name }, { database }, info) =>
      database.collection("models").findOne(
        {
          owner_login_lower: owner.toLowerCase(),
          name_lower: name.toLowerCase(),
          principals: "public",
        },
        { projection: projectionOf(info, ["_id"]), maxTimeMS: MAX_TIME_MS },
      ),
    models,
    series: async (_, { libraries }, { database }) => {
      const rows = await database
        .collection("bench_series")
        .find(
          { library: { $in: libraries } },
          {
            projection: { _id: 0, library: 1, points: 1 },
            batchSize: BATCH,
            maxTimeMS: MAX_TIME_MS,
          },
        )
        .toArray();
      const found = new Map(rows.map((row) => [row.library, row]));
      return libraries.map((library) => found.get(library)).filter(Boolean);
    },
  },
  Mutation: { updateModel, likeModel: liking(1), unlikeModel: liking(-1) },
  Model: {
    id: (row) => globalId("Model", row._id),
    fullName: (row) => `${row.owner_login}/${row.name}`,
    createdAt: (row) => row.created_at,
    updatedAt: (row) => row.updated_at,
    owner: (row, _, { owners }) => owners.load(row.owner_id.toHexString()),
    latestVersion: (row, _, { versions }) =>
      row.latest_version_id && versions.load(row.latest_version_id.toHexString()),
  },
  ModelStats: {
    downloads30d: (stats) => stats.downloads_30d,
  },
  Actor: {
    __resolveType: (row) => row.kind,
  },
  User: actor,
  Organization: actor,
  ModelVersion: {
    id: (row) => globalId("ModelVersion", row._id),
    sizeBytes: (row) => row.size_bytes,
    fileCount: (row) => row.file_count,
    publishedAt: (row) => row.published_at,
    files: (row, { first }, { files }) => files(first ?? 20).load(row._id.toHexString()),
  },
  ModelFile: {
    sizeBytes: (row) => row.size_bytes,
  },
  ModelConnection: {
    nodes: nodesOf,
    edges: (page) => nodesOf(page).map((node) => ({ node, page })),
    pageInfo: (page) => {
      const nodes = nodesOf(page);
      return {
        hasNextPage: page.rows.length > page.limit,
        endCursor: nodes.length ? encodeCursor(page.tag, page.path, nodes.at(-1)) : null,
      };
    },
    totalCount: (page, _, { database }) =>
      page.total ??
      database.collection("models").countDocuments(page.query, { maxTimeMS: MAX_TIME_MS }),
  },
  ModelEdge: {
    cursor: ({ node, page }) => encodeCursor(page.tag, page.path, node),
    score: ({ node }) => node.score ?? null,
  },
};

export const schema = makeExecutableSchema({
  typeDefs: readFileSync(new URL("schema.graphql", import.meta.url), "utf8"),
  resolvers,
});
