-- write, batch
--
-- Report incidents, each with the first entry of its timeline. A request with an Idempotency-Key is
-- carried out once: when the key was used before, is_replay is true, id is what the key's first
-- request made, and body and etag are null. is_same_request tells whether that first request was
-- the same as this one.
--   $1 idempotency_key  text[]   null for none; no key twice
--   $2 digest           bytea[]  of the request, null without a key
--   $3 actor            text[]
--   $4 description      text[]
--   $5 source           text[]
--   $6 labels           jsonb[]  objects of strings, null for none
  WITH with_ids AS MATERIALIZED (
       SELECT coalesce(made_id, nextval('incidents_id_seq')) AS id,
              actor, description, source, coalesce(labels, '{}') AS labels, ordinal,
              coalesce(is_replay, false) AS is_replay,
              coalesce(is_same_request, true) AS is_same_request
         FROM unnest($3::text[], $4::text[], $5::text[], $6::jsonb[])
              WITH ORDINALITY AS input (actor, description, source, labels, ordinal)
              LEFT JOIN claim_idempotency_keys($3, $1::text[], $2::bytea[], 'incidents_id_seq')
                   AS claim (ordinal, made_id, is_replay, is_same_request) USING (ordinal)),

       created AS (
       INSERT INTO incidents (id, description, source, labels)
       SELECT id, description, source, labels
         FROM with_ids
        WHERE NOT is_replay
       RETURNING id, created_at, format('"%s"', version) AS etag, incident_json(incidents) AS body),

       entries AS (
       INSERT INTO timeline (incident_id, kind, actor, created_at)
       SELECT id, 'created', actor, created_at
         FROM created
              JOIN with_ids USING (id))

SELECT id, etag, body::json, is_replay, is_same_request
  FROM with_ids
       LEFT JOIN created USING (id)
 ORDER BY ordinal;
