-- kind: write, batch
--
-- Change incidents, and write an entry on the timeline for each field that gets another value. body is
-- null when there is no such incident. is_match is false, and nothing is changed, when If-Match lacks
-- the incident's entity tag. No incident_id may appear twice.
--   $1 incident_id  bigint[]
--   $2 description  text[]    null to keep it
--   $3 source       text[]    null to keep it
--   $4 status       text[]    null to keep it
--   $5 if_match     text[]    the header (RFC 9110, 13.1.1: weak tags never match), null for none
--   $6 actor        text[]
-- The rows are locked before they are read, so that the old values on the timeline are current. And
-- clock_timestamp(), unlike now(), is later than the change that the lock may have waited for.
  WITH input AS (
       SELECT id, description, source, status, if_match, actor, position
         FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
              WITH ORDINALITY AS input (id, description, source, status, if_match, actor, position)),
       locked AS (
       SELECT position, actor, incident.*, coalesce(input.description, incident.description) AS new_description,
              coalesce(input.source, incident.source) AS new_source, coalesce(input.status, incident.status) AS new_status,
              coalesce(if_match, '*') = '*'
              OR format('"%s"', version) = ANY (regexp_split_to_array(if_match, '\s*,\s*')) AS is_match
         FROM input
              CROSS JOIN LATERAL (
              SELECT id, description, source, status, version, incident_json(incidents) AS body,
                     greatest(updated_at, noted_at, clock_timestamp()) AS changed_at
                FROM incidents
               WHERE incidents.id = input.id
                 FOR NO KEY UPDATE) AS incident),
       changed AS (
       UPDATE incidents
          SET description = new_description, source = new_source, status = new_status,
              version = locked.version + 1, updated_at = changed_at
         FROM locked
        WHERE incidents.id = locked.id AND is_match
          AND (new_description, new_source, new_status) <> (locked.description, locked.source, locked.status)
       RETURNING incidents.id, incidents.version, incident_json(incidents) AS body),
       entries AS (
       INSERT INTO timeline (incident_id, kind, field, from_value, to_value, actor, created_at)
       SELECT id, kind, field, old, new, actor, changed_at
         FROM locked JOIN changed USING (id) CROSS JOIN LATERAL (
              VALUES ('edited', 'description', locked.description, new_description),
                     ('edited', 'source', locked.source, new_source),
                     ('status', NULL, locked.status, new_status)) AS change (kind, field, old, new)
        WHERE old <> new)
SELECT coalesce(changed.body, locked.body)::json AS body, is_match,
       format('"%s"', coalesce(changed.version, locked.version)) AS etag
  FROM input LEFT JOIN locked USING (position) LEFT JOIN changed ON changed.id = locked.id
 ORDER BY position;
