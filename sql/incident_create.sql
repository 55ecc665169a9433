-- Report an incident, with the first entry of its timeline: once for each Idempotency-Key of an actor.
-- replayed: the key was used before, and id is the incident that it made; body and etag are null.
-- same: the key was used with this very request.
--   $1 key          text   null for none
--   $2 digest       bytea  of the request, null for none
--   $3 actor        text
--   $4 description  text
--   $5 source       text
-- On a conflict the key's row is touched, since only an update gives the row of another transaction
-- back, once that has committed.
  WITH used AS (
       INSERT INTO idempotency_keys AS kept (actor, key, digest, made_id)
       SELECT $3, $1, $2, nextval('incidents_id_seq')
        WHERE $1::text IS NOT NULL
       ON CONFLICT (actor, key) DO UPDATE SET replays = kept.replays + 1
       RETURNING made_id, replays > 0 AS replayed, digest = $2 AS same),
       created AS (
       INSERT INTO incidents (id, description, source)
       SELECT coalesce(made_id, nextval('incidents_id_seq')), $4, $5::text
         FROM (SELECT) AS once LEFT JOIN used ON true
        WHERE replayed IS NOT TRUE
       RETURNING id, created_at, format('"%s"', version) AS etag, incident_json(incidents) AS body),
       entry AS (
       INSERT INTO timeline (incident_id, kind, actor, created_at)
       SELECT id, 'created', $3, created_at
         FROM created)
SELECT coalesce(created.id, made_id) AS id, etag, body::json,
       coalesce(replayed, false) AS replayed, coalesce(same, true) AS same
  FROM (SELECT) AS once LEFT JOIN used ON true LEFT JOIN created ON true;
