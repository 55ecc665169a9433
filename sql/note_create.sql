-- write, batch
--
-- Append notes to the timelines of incidents. id and body are null when there is no such incident,
-- or when must_retry is true, because another transaction holds the incident; Batcher then runs the
-- call again.
-- An Idempotency-Key works as in incident_create.sql.
--   $1 idempotency_key  text[]    null for none; no key twice
--   $2 digest           bytea[]   of the request, null without a key
--   $3 actor            text[]
--   $4 incident_id      bigint[]
--   $5 note             text[]
  WITH -- SKIP LOCKED skips an incident that another transaction holds, so that one held
       -- incident delays no other.
       locked AS MATERIALIZED (
       SELECT id, greatest(updated_at, noted_at) AS last_entry_at
         FROM incidents
        WHERE id = ANY ($4::bigint[])
          FOR NO KEY UPDATE SKIP LOCKED),

       -- The key stays unused if no note is added.
       input AS MATERIALIZED (
       SELECT CASE WHEN locked.id IS NOT NULL THEN idempotency_key END AS idempotency_key,
              actor, incident_id, note, ordinal, last_entry_at,
              locked.id IS NOT NULL AS is_possible
         FROM unnest($1::text[], $3::text[], $4, $5::text[])
              WITH ORDINALITY AS request (idempotency_key, actor, incident_id, note, ordinal)
              LEFT JOIN locked ON locked.id = incident_id),

       with_ids AS MATERIALIZED (
       SELECT CASE WHEN is_possible THEN coalesce(made_id, nextval('timeline_id_seq')) END AS id,
              actor, incident_id, note, ordinal, last_entry_at, is_possible,
              coalesce(is_replay, false) AS is_replay,
              coalesce(is_same_request, true) AS is_same_request
         FROM input
              LEFT JOIN claim_idempotency_keys(
                  $3, (SELECT array_agg(idempotency_key ORDER BY ordinal) FROM input),
                  $2::bytea[], 'timeline_id_seq')
                  AS claim (ordinal, made_id, is_replay, is_same_request) USING (ordinal)),

       created AS (
       INSERT INTO timeline (id, incident_id, kind, note, actor, created_at)
       SELECT id, incident_id, 'note', note, actor, greatest(last_entry_at, clock_timestamp())
         FROM with_ids
        WHERE is_possible AND NOT is_replay
        ORDER BY id
       RETURNING id, incident_id, created_at, timeline_json(timeline) AS body),

       noted AS (
       UPDATE incidents
          SET noted_at = newest.created_at
         FROM (SELECT incident_id, max(created_at) AS created_at
                 FROM created
                GROUP BY incident_id) AS newest
        WHERE incidents.id = newest.incident_id)

SELECT id, body, is_replay, is_same_request,
       NOT is_possible
       AND EXISTS (SELECT FROM incidents WHERE incidents.id = with_ids.incident_id) AS must_retry
  FROM with_ids
       LEFT JOIN created USING (id)
 ORDER BY ordinal;
