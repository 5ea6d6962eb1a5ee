// Makes the users of agq in a new database (mongosh runs it once, as root of the database). For a
// database that was there before, see docs/containers.md.
const { readFileSync } = require("fs");

for (const [secret, role] of [["mongo-uri", "readWrite"], ["mongo-read-uri", "read"]]) {
  const uri = readFileSync(`/run/secrets/${secret}`, "utf8");
  const [name, pwd] = uri.match(/^mongodb:\/\/([^:@/]+):([^:@/]+)@/).slice(1).map(decodeURIComponent);
  const admin = db.getSiblingDB("admin");
  const rights = { pwd, roles: [{ role, db: "agq" }] };
  if (admin.getUser(name)) {
    admin.updateUser(name, rights);
  } else {
    admin.createUser({ user: name, ...rights });
  }
}
