"use strict";
// `node serve.js APP`: APP in Node's own cluster, WORKERS workers, on PORT. Under PM2 the app file is run directly.
const cluster = require("node:cluster");

if (cluster.isPrimary) {
  for (let i = 0; i < Number(process.env.WORKERS); i++) cluster.fork();
  process.on("SIGTERM", () => process.exit(0));
} else {
  require(process.argv[2]);
}
