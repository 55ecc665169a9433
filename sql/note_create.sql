-- kind: write, batch
--
-- Append notes to the timelines of incidents; id is null when there is no such incident. An
-- Idempotency-Key works as in incident_create.sql.
--   $1 key          text[]    null for none
--   $2 digest       bytea[]   of the request, null without a key
--   $3 actor        text[]
--   $4 incident_id  bigint[]
--   $5 note         text[]
-- A key is not claimed when the incident does not exist.
  WITH input AS (
       SELECT actor, incident_id, note, position, id IS NOT NULL AS is_found,
              CASE WHEN id IS NOT NULL THEN key END AS key
         FROM unnest($1::text[], $3::text[], $4::bigint[], $5::text[])
              WITH ORDINALITY AS input (key, actor, incident_id, note, position)
              LEFT JOIN incidents ON id = incident_id),
       with_ids AS MATERIALIZED (
       SELECT CASE WHEN is_found THEN coalesce(made_id, nextval('timeline_id_seq')) END AS id,
              actor, incident_id, note, position,
              coalesce(is_replay, false) AS is_replay, coalesce(is_same_request, true) AS is_same_request
         FROM input
              LEFT JOIN claim_idempotency_keys(
                  $3, (SELECT array_agg(key ORDER BY position) FROM input), $2::bytea[], 'timeline_id_seq')
              USING (position)),
       created AS (
       INSERT INTO timeline (id, incident_id, kind, note, actor)
       SELECT id, incident_id, 'note', note, actor
         FROM with_ids
        WHERE id IS NOT NULL AND NOT is_replay
       RETURNING id, timeline_json(timeline) AS body)
SELECT id, body, is_replay, is_same_request
  FROM with_ids LEFT JOIN created USING (id)
 ORDER BY position;
