-- Change incidents, with an entry on the timeline for each field that changes; what one already is
-- changes nothing. body is null when there is no such incident; nothing changes unless matched.
-- Parameters hold an element a call, and the rows come in their order; an incident is there once.
--   $1 incident_id  bigint[]
--   $2 description  text[]    null to keep it
--   $3 source       text[]    null to keep it
--   $4 status       text[]    null to keep it
--   $5 if_match     text[]    the header (RFC 9110, 13.1.1), null for none; weak tags never match
--   $6 actor        text[]
-- The rows are locked first: only then are the values that the timeline gives as former ones the last,
-- and the clock, unlike now(), is past the change before this one.
  WITH call AS (
       SELECT id, description, source, status, if_match, actor, place
         FROM unnest($1::bigint[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
              WITH ORDINALITY AS call (id, description, source, status, if_match, actor, place)),
       before AS (
       SELECT place, actor, incident.*, coalesce(call.description, incident.description) AS new_description,
              coalesce(call.source, incident.source) AS new_source,
              coalesce(call.status, incident.status) AS new_status,
              coalesce(if_match, '*') = '*'
              OR format('"%s"', version) = ANY (regexp_split_to_array(if_match, '\s*,\s*')) AS matched
         FROM call
              CROSS JOIN LATERAL (
              SELECT id, description, source, status, version, incident_json(incidents) AS body,
                     greatest(updated_at, clock_timestamp()) AS changed_at
                FROM incidents
               WHERE incidents.id = call.id
                 FOR NO KEY UPDATE) AS incident),
       changed AS (
       UPDATE incidents
          SET description = new_description, source = new_source, status = new_status,
              version = before.version + 1, updated_at = changed_at
         FROM before
        WHERE incidents.id = before.id AND matched
          AND (new_description, new_source, new_status) <> (before.description, before.source, before.status)
       RETURNING incidents.id, incidents.version, incident_json(incidents) AS body),
       entries AS (
       INSERT INTO timeline (incident_id, kind, field, from_value, to_value, actor, created_at)
       SELECT id, kind, field, was, becomes, actor, changed_at
         FROM before
              JOIN changed USING (id)
              CROSS JOIN LATERAL (
              VALUES ('edited', 'description', before.description, new_description),
                     ('edited', 'source', before.source, new_source),
                     ('status', NULL, before.status, new_status)) AS fact (kind, field, was, becomes)
        WHERE was <> becomes)
SELECT coalesce(changed.body, before.body)::json AS body,
       format('"%s"', coalesce(changed.version, before.version)) AS etag, matched
  FROM call LEFT JOIN before USING (place) LEFT JOIN changed ON changed.id = before.id
 ORDER BY place;
