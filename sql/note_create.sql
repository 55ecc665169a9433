-- Append notes to the timelines of incidents: once for each Idempotency-Key of an actor. id is null when
-- there is no such incident; for replayed and same see incident_create.sql.
-- Parameters hold an element a call, and the rows come in their order; a key is there once.
--   $1 key          text[]    null for none
--   $2 digest       bytea[]   of the request, null for none
--   $3 actor        text[]
--   $4 incident_id  bigint[]
--   $5 note         text[]
  WITH call AS (
       SELECT key, digest, actor, incident_id, note, place,
              EXISTS (SELECT FROM incidents WHERE id = incident_id) AS found
         FROM unnest($1::text[], $2::bytea[], $3::text[], $4::bigint[], $5::text[])
              WITH ORDINALITY AS call (key, digest, actor, incident_id, note, place)),
       used AS (
       INSERT INTO idempotency_keys AS kept (actor, key, digest, made_id)
       SELECT actor, key, digest, nextval('timeline_id_seq')
         FROM call
        WHERE found AND key IS NOT NULL
       ON CONFLICT (actor, key) DO UPDATE
          SET replays = kept.replays + (kept.digest = excluded.digest)::integer
       RETURNING actor, key, digest, made_id, replays),
       numbered AS MATERIALIZED (
       SELECT CASE WHEN found THEN coalesce(made_id, nextval('timeline_id_seq')) END AS id,
              incident_id, note, actor, place,
              coalesce(used.digest = call.digest, true) AS same,
              coalesce(replays > 0 OR used.digest <> call.digest, false) AS replayed
         FROM call LEFT JOIN used USING (actor, key)),
       entry AS (
       INSERT INTO timeline (id, incident_id, kind, note, actor)
       SELECT id, incident_id, 'note', note, actor
         FROM numbered
        WHERE id IS NOT NULL AND NOT replayed
       RETURNING id, timeline_json(timeline) AS body)
SELECT id, body, replayed, same
  FROM numbered LEFT JOIN entry USING (id)
 ORDER BY place;
