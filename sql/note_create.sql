-- Append a note to an incident's timeline: once for each Idempotency-Key of an actor. id is null when
-- there is no such incident; for replayed and same see incident_create.sql.
--   $1 key          text    null for none
--   $2 digest       bytea   of the request, null for none
--   $3 actor        text
--   $4 incident_id  bigint
--   $5 note         text
  WITH incident AS (
       SELECT id
         FROM incidents
        WHERE id = $4),
       used AS (
       INSERT INTO idempotency_keys AS kept (actor, key, digest, made_id)
       SELECT $3, $1, $2, nextval('timeline_id_seq')
         FROM incident
        WHERE $1::text IS NOT NULL
       ON CONFLICT (actor, key) DO UPDATE SET replays = kept.replays + 1
       RETURNING made_id, replays > 0 AS replayed, digest = $2 AS same),
       entry AS (
       INSERT INTO timeline (id, incident_id, kind, note, actor)
       SELECT coalesce(made_id, nextval('timeline_id_seq')), incident.id, 'note', $5::text, $3
         FROM incident LEFT JOIN used ON true
        WHERE replayed IS NOT TRUE
       RETURNING id, timeline_json(timeline) AS body)
SELECT coalesce(entry.id, made_id) AS id, body,
       coalesce(replayed, false) AS replayed, coalesce(same, true) AS same
  FROM (SELECT) AS once LEFT JOIN used ON true LEFT JOIN entry ON true;
