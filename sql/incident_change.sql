-- kind: write, batch
--
-- Change incidents, and write an entry on the timeline for each field that gets another value, and one for a
-- note, which does not change the incident itself. body is null when there is no such incident. is_match is
-- false, and nothing is changed, when If-Match lacks the incident's entity tag. No incident_id may appear twice.
--   $1 incident_id  bigint[]
--   $2 description  text[]    null to keep it
--   $3 source       text[]    null to keep it
--   $4 status       text[]    null to keep it
--   $5 if_match     text[]    the header (RFC 9110, 13.1.1: weak tags never match), null for none
--   $6 actor        text[]
--   $7 note         text[]    null for none
-- The rows are locked before they are read, so that the old values on the timeline are current. And
-- clock_timestamp(), unlike now(), is later than the change that the lock may have waited for.
  WITH input AS (
       SELECT id, description, source, status, if_match, actor, note, position
         FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])
              WITH ORDINALITY AS input (id, description, source, status, if_match, actor, note, position)),
       locked AS (
       SELECT position, actor, note, incident.*,
              input.description AS new_description, input.source AS new_source, input.status AS new_status,
              if_match IS NULL OR '*' = if_match OR etag = ANY (regexp_split_to_array(if_match, '\s*,\s*')) AS is_match,
              ((input.description, input.source, input.status)
               <> (incident.description, incident.source, incident.status)) IS TRUE AS is_change
         FROM input CROSS JOIN LATERAL (
              SELECT id, description, source, status, version, format('"%s"', version) AS etag, incident_json(incidents) AS body,
                     greatest(updated_at, noted_at, clock_timestamp()) AS changed_at
                FROM incidents
               WHERE incidents.id = input.id
                 FOR NO KEY UPDATE) AS incident),
       changed AS (
       UPDATE incidents
          SET description = coalesce(new_description, incidents.description), source = coalesce(new_source, incidents.source),
              status = coalesce(new_status, incidents.status), version = locked.version + is_change::integer,
              updated_at = CASE WHEN is_change THEN changed_at ELSE updated_at END,
              noted_at = CASE WHEN note IS NULL THEN noted_at ELSE changed_at END
         FROM locked WHERE incidents.id = locked.id AND is_match AND (is_change OR note IS NOT NULL)
       RETURNING incidents.id, format('"%s"', incidents.version) AS etag, incident_json(incidents) AS body),
       entries AS (
       INSERT INTO timeline (incident_id, kind, field, from_value, to_value, note, actor, created_at)
       SELECT id, kind, field, old, new, entry_note, actor, changed_at
         FROM locked JOIN changed USING (id) CROSS JOIN LATERAL (
              VALUES ('edited', 'description', locked.description, new_description, NULL),
                     ('edited', 'source', locked.source, new_source, NULL),
                     ('status', NULL, locked.status, new_status, NULL),
                     ('note', NULL, NULL, NULL, note)) AS entry (kind, field, old, new, entry_note)
        WHERE old <> new OR entry_note IS NOT NULL)
SELECT coalesce(changed.body, locked.body)::json AS body, coalesce(changed.etag, locked.etag) AS etag, is_match
  FROM input LEFT JOIN locked USING (position) LEFT JOIN changed ON changed.id = locked.id
 ORDER BY position;
