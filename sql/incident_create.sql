-- Report incidents, each with the first entry of its timeline: once for each Idempotency-Key of an actor.
-- Parameters hold an element a call, and the rows come in their order; a key is there once.
-- replayed: the key was used before, and id is the incident that it made; body and etag are null.
-- same: the key was used with this very request.
--   $1 key          text[]   null for none
--   $2 digest       bytea[]  of the request, null for none
--   $3 actor        text[]
--   $4 description  text[]
--   $5 source       text[]
-- On a conflict the key's row is touched, since only an update gives the row of another transaction
-- back, once that has committed.
  WITH call AS (
       SELECT key, digest, actor, description, source, place
         FROM unnest($1::text[], $2::bytea[], $3::text[], $4::text[], $5::text[])
              WITH ORDINALITY AS call (key, digest, actor, description, source, place)),
       used AS (
       INSERT INTO idempotency_keys AS kept (actor, key, digest, made_id)
       SELECT actor, key, digest, nextval('incidents_id_seq')
         FROM call
        WHERE key IS NOT NULL
       ON CONFLICT (actor, key) DO UPDATE
          SET replays = kept.replays + (kept.digest = excluded.digest)::integer
       RETURNING actor, key, digest, made_id, replays),
       numbered AS MATERIALIZED (
       SELECT coalesce(made_id, nextval('incidents_id_seq')) AS id, actor, description, source, place,
              coalesce(used.digest = call.digest, true) AS same,
              coalesce(replays > 0 OR used.digest <> call.digest, false) AS replayed
         FROM call LEFT JOIN used USING (actor, key)),
       created AS (
       INSERT INTO incidents (id, description, source)
       SELECT id, description, source
         FROM numbered
        WHERE NOT replayed
       RETURNING id, created_at, format('"%s"', version) AS etag, incident_json(incidents) AS body),
       entry AS (
       INSERT INTO timeline (incident_id, kind, actor, created_at)
       SELECT id, 'created', actor, created_at
         FROM created JOIN numbered USING (id))
SELECT id, etag, body::json, replayed, same
  FROM numbered LEFT JOIN created USING (id)
 ORDER BY place;
