-- write, batch
--
-- Change incidents, and write an entry on the timeline for each field and each label that gets
-- another value, and one for a note, which does not change the incident itself. No incident may be
-- in a batch twice. body and etag are null when there is no such incident. Nothing is changed when
-- is_match is false, because If-Match lacks the incident's etag, or when must_retry is true: then
-- another transaction holds the incident, and Batcher runs the call again. SQLSTATE 22023 when over
-- 32 labels would be left.
--   $1 incident_id  bigint[]
--   $2 description  text[]    null to keep it
--   $3 source       text[]    null to keep it
--   $4 status       text[]    null to keep it
--   $5 if_match     text[]    the header (RFC 9110, 13.1.1: weak tags never match), null for none
--   $6 actor        text[]
--   $7 note         text[]    null for none
--   $8 label_patch  jsonb[]   names and new values, null removes a label; null to keep all
  WITH input AS (
       SELECT *
         FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[],
                     $7::text[], $8::jsonb[])
              WITH ORDINALITY AS input (id, description, source, status, if_match, actor,
                                        note, label_patch, ordinal)),

       -- The rows are locked before they are read, so that the old values on the timeline are
       -- current. SKIP LOCKED skips a row that another transaction holds, so that one held
       -- incident delays no other. The time comes from clock_timestamp(), because now() may be
       -- earlier than a change that is seen here, and from greatest(), because a clock may go back.
       locked AS (
       SELECT ordinal, actor, note, label_patch, incident.*,
              coalesce(input.description, incident.description) AS new_description,
              coalesce(input.source, incident.source) AS new_source,
              coalesce(input.status, incident.status) AS new_status,
              if_match IS NULL OR if_match = '*'
              OR etag = ANY (regexp_split_to_array(if_match, '\s*,\s*')) AS is_match
         FROM input
              CROSS JOIN LATERAL (
              SELECT id, description, source, status, labels, format('"%s"', version) AS etag,
                     version, incident_json(incidents) AS body,
                     greatest(updated_at, noted_at, clock_timestamp()) AS new_updated_at
                FROM incidents
               WHERE incidents.id = input.id
                 FOR NO KEY UPDATE SKIP LOCKED) AS incident),

       compared AS (
       SELECT *,
              (description, source, status, labels)
              <> (new_description, new_source, new_status, new_labels) AS is_change
         FROM locked
              CROSS JOIN LATERAL (
              SELECT CASE WHEN is_match AND label_patch IS NOT NULL
                          THEN merge_labels(labels, label_patch)
                          ELSE labels END AS new_labels) AS merged),

       changed AS (
       UPDATE incidents
          SET description = new_description,
              source = new_source,
              status = new_status,
              labels = new_labels,
              version = compared.version + is_change::integer,
              updated_at = CASE WHEN is_change THEN new_updated_at ELSE updated_at END,
              noted_at = CASE WHEN note IS NULL THEN noted_at ELSE new_updated_at END
         FROM compared
        WHERE incidents.id = compared.id AND is_match AND (is_change OR note IS NOT NULL)
       RETURNING incidents.id, format('"%s"', incidents.version) AS etag,
                 incident_json(incidents) AS body),

       entries AS (
       INSERT INTO timeline
              (incident_id, kind, field, from_value, to_value, note, actor, created_at)
       SELECT id, kind, field, from_value, to_value, entry_note, actor, new_updated_at
         FROM compared
              JOIN changed USING (id)
              CROSS JOIN LATERAL (
              VALUES ('edited', 'description', description, new_description, NULL),
                     ('edited', 'source', source, new_source, NULL)
               UNION ALL
              SELECT 'edited', label.field, label.from_value, label.to_value, NULL
                FROM changed_labels(labels, new_labels) AS label
               UNION ALL
              VALUES ('status', NULL, status, new_status, NULL),
                     ('note', NULL, NULL, NULL, note))
              AS entry (kind, field, from_value, to_value, entry_note)
        WHERE from_value IS DISTINCT FROM to_value OR entry_note IS NOT NULL)

SELECT coalesce(changed.body, locked.body)::json AS body,
       coalesce(changed.etag, locked.etag) AS etag,
       is_match,
       locked.id IS NULL
       AND EXISTS (SELECT FROM incidents WHERE incidents.id = input.id) AS must_retry
  FROM input
       LEFT JOIN locked USING (ordinal)
       LEFT JOIN changed ON changed.id = locked.id
 ORDER BY ordinal;
