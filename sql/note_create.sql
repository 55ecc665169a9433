-- write, batch
--
-- Append notes to the timelines of incidents; id is null when there is no such incident. An
-- Idempotency-Key works as in incident_create.sql.
--   $1 key          text[]    null for none
--   $2 digest       bytea[]   of the request, null without a key
--   $3 actor        text[]
--   $4 incident_id  bigint[]
--   $5 note         text[]
-- Incidents that another transaction holds are passed over (SKIP LOCKED): is_locked is true then, and no note is added.
-- A key is claimed only after its incident was locked.
  WITH locked_incidents AS MATERIALIZED (
       SELECT id, greatest(updated_at, noted_at) AS last_entry_at
         FROM incidents
        WHERE id = ANY ($4::bigint[])
          FOR NO KEY UPDATE SKIP LOCKED),
       input AS MATERIALIZED (
       SELECT CASE WHEN id IS NOT NULL THEN key END AS key, actor, id AS incident_id, wanted_id, note, last_entry_at, position
         FROM unnest($1::text[], $3::text[], $4, $5::text[])
              WITH ORDINALITY AS input (key, actor, wanted_id, note, position)
              LEFT JOIN locked_incidents ON id = wanted_id),
       with_ids AS MATERIALIZED (
       SELECT CASE WHEN incident_id IS NOT NULL THEN coalesce(made_id, nextval('timeline_id_seq')) END AS id,
              input.*, coalesce(is_replay, false) AS is_replay, coalesce(is_same_request, true) AS is_same_request
         FROM input
              LEFT JOIN claim_idempotency_keys(
                  $3, (SELECT array_agg(key ORDER BY position) FROM input), $2::bytea[], 'timeline_id_seq')
              USING (position)),
       created AS (
       INSERT INTO timeline (id, incident_id, kind, note, actor, created_at)
       SELECT id, incident_id, 'note', note, actor, greatest(last_entry_at, clock_timestamp())
         FROM with_ids
        WHERE id IS NOT NULL AND NOT is_replay
        ORDER BY id
       RETURNING id, incident_id, created_at, timeline_json(timeline) AS body),
       noted AS (
       UPDATE incidents
          SET noted_at = newest.created_at
         FROM (SELECT incident_id, max(created_at) AS created_at FROM created GROUP BY incident_id) AS newest
        WHERE incidents.id = newest.incident_id)
SELECT id, body, is_replay, is_same_request,
       with_ids.incident_id IS NULL
       AND EXISTS (SELECT FROM incidents WHERE incidents.id = wanted_id) AS is_locked
  FROM with_ids LEFT JOIN created USING (id)
 ORDER BY position;
